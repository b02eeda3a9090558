"""Llama of a billion parameters and GPT-2 of 124 million on one GPU, beside transformers.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --pairs 9 --json gpu.jsonl

Weights are random, in bfloat16: they take as long as real ones. Decoding one text is told as a
share of the memory's bandwidth, measured in the same minute: each token reads all weights once.
Where there is no GPU that is said, and nothing is measured; transformers may be absent.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import polyhead as ph

SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "llama-1b": ("llama", dict(
        vocab_size=128256, d_model=2048, num_layers=16, num_heads=32, num_kv_heads=8, d_ff=8192,
        max_seq_len=2048,
    )),
    "gpt2-124m": ("gpt2", dict(
        vocab_size=50257, d_model=768, num_layers=12, num_heads=12, max_seq_len=1024
    )),
}  # fmt: skip
PROMPT, WRITTEN = 512, 128  # tokens


def main() -> int:
    """Measure, print, and keep where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return 0
    device = torch.device("cuda")
    speed = bandwidth(device)
    records = [
        {"gpu": torch.cuda.get_device_name(), "bandwidth": speed, "torch": torch.__version__}
    ]
    print(f"{records[0]['gpu']}, {speed / 1e12:.2f} TB/s read")
    for name, (family, fields) in SIZES.items():
        records += measure(name, family, fields, device, speed, given.pairs)
    if given.json:
        text = "".join(json.dumps(record) + "\n" for record in records)
        given.json.write_text(text, encoding="utf-8")
    return 0


def bandwidth(device: torch.device, numbers: int = 1 << 30) -> float:
    """Bytes a second that a sum reads."""
    x = torch.ones(numbers, device=device, dtype=torch.float32)
    return x.numel() * 4 / statistics.median(_timed(x.sum, device) for _ in range(9))


def measure(
    name: str, family: str, fields: dict[str, int], device: torch.device, speed: float, pairs: int
) -> list[dict[str, Any]]:
    """Seconds of prefill, of one text and of 64 at once, ours and theirs in turns."""
    model = ph.build(family, seed=0, **fields).eval().to(device, torch.bfloat16)
    ours = _ours(model)
    theirs = _theirs(model, device)
    read = sum(p.numel() for key, p in model.named_parameters() if "position" not in key) * 2
    found: list[dict[str, Any]] = []
    for task, rows, prompt, written in (
        ("prefill", 1, PROMPT, 1), ("decode", 1, 16, WRITTEN), ("batch 64", 64, 16, WRITTEN),
    ):  # fmt: skip
        runs = {"ours": ours, **({"theirs": theirs} if theirs else {})}
        times: dict[str, list[float]] = {key: [] for key in runs}
        for pair in range(-1, pairs):  # the first warms up
            for key in sorted(runs, reverse=pair % 2 == 1):
                seconds = _timed(partial(runs[key], rows, prompt, written), device)
                times[key] += [seconds] if pair >= 0 else []
        tokens = rows * (prompt if task == "prefill" else written)
        middle = statistics.median(times["ours"])
        record: dict[str, Any] = {"model": name, "task": task, "tokens_per_s": tokens / middle}
        line = f"{name} {task}: {tokens / middle:.0f} tokens/s"
        if task == "decode":
            record["share"] = written * read / middle / speed
            line += f", {record['share']:.0%} of the bandwidth"
        if theirs:
            both = zip(times["theirs"], times["ours"], strict=True)
            record["ratio"] = statistics.median(b / a for b, a in both)
            line += f", {record['ratio']:.2f} x transformers"
        found.append(record)
        print(line, flush=True)
    return found


Run = Callable[[int, int, int], Any]


def _ours(model: Any) -> Run:
    engine = ph.Engine(model, None, ph.EngineConfig(max_rows=64, cache_tokens=64 * 256))
    number = 0

    def run(rows: int, prompt: int, written: int) -> None:
        nonlocal number
        settings = ph.GenerationConfig(max_new_tokens=written, temperature=0.0)
        for row in range(rows):
            number += 1  # so that no prompt is found again
            engine.add([number % 50000, *range(row + 1, row + prompt)], settings, ends=())
        engine.run()

    return run


def _theirs(model: Any, device: torch.device) -> Run | None:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        print("transformers is not there")
        return None
    config = AutoConfig.for_model(**model.hf_config())
    peer: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    peer = peer.to(device).eval()

    def run(rows: int, prompt: int, written: int) -> None:
        ids = torch.arange(1, prompt + 1, device=device).repeat(rows, 1)
        with torch.inference_mode():
            peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=written, min_new_tokens=written, pad_token_id=0,
            )  # fmt: skip

    return run


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
