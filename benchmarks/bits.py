"""What few bits cost SmolLM2-135M, of weights that lie on no grid, beside llama.cpp's same bits.

The weights at hand are a file's of four bits, which a form of four bits gives back as they were.
So residual channels, channels of values and neurons change places: the model answers the same, and
a group of 32 weights now holds those of many. Inputs for calibration are film reviews, verses of
the Bible and Python's documentation, or some of these; perplexity is of other verses and reviews.

    python -m benchmarks.bits
    python -m benchmarks.bits --only 'int8*' --calibration reviews --json bits.jsonl
"""

import argparse
import fnmatch
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarks.peers.client import ROOT, AbsentError, Worker
from benchmarks.peers.inputs import BIBLE
from benchmarks.peers.ours import weight_bytes

import polyhead as ph
from polyhead.cli.corpora import pydocs, split
from polyhead.cli.main import main as polyhead
from polyhead.models.model import TaskModel

REVIEWS = BIBLE.with_name("movie-reviews.tsv")
WINDOW, CALIBRATION, HELD = 512, 48, 10  # tokens, and stretches of them
KNOWN = ("reviews", "Bible", "Python")  # what may be calibrated with
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {},
    "int8-rows": {},
    "int8 awq": dict(method="awq"),
    "int8 gptq": dict(method="gptq"),
    "int4": {},
    "int4 gptq": dict(method="gptq"),
    "int4 gptq untuned": dict(method="gptq", tuning=0),
    "int4 awq": dict(method="awq"),
    "int4 g64 gptq": dict(method="gptq", group=64),
    "int4 g128 gptq": dict(method="gptq", group=128),
    "nf4": {},
}
THEIRS = ("Q8_0", "Q4_1", "Q4_0")
Windows = list[list[int]]


def main() -> None:
    """Print a Markdown table, a line at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="*", help="forms, by a pattern")
    parser.add_argument("--calibration", nargs="+", choices=KNOWN, default=KNOWN)
    parser.add_argument("--json", type=Path, help="append a line for each form here")
    parser.add_argument("--python", default=str(ROOT / ".peers" / "bin" / "python"))
    asked = parser.parse_args()
    model = shuffled(ph.load("smollm2-135m", dtype=torch.float32).eval())
    calibration, texts = stretches(asked.calibration)
    plain: dict[str, float] = {}
    print("| form | MB | " + " | ".join(texts) + " | seconds to make |")
    print("|---|---|" + "---|" * (len(texts) + 1))
    for name, size, seconds, nats in rows(model, calibration, texts, asked.only, asked.python):
        plain = plain or nats
        cells = [f"{math.exp(x):.3f}, {math.expm1(x - plain[t]):+.2%}" for t, x in nats.items()]
        print(f"| {name} | {size / 1e6:.0f} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
        if asked.json:
            line = {"form": name, "bytes": size, "seconds": seconds, "nats": nats}
            with asked.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def rows(
    model: TaskModel,
    calibration: list[torch.Tensor],
    texts: dict[str, Windows],
    only: str,
    python: str,
) -> Iterator[tuple[str, int, float, dict[str, float]]]:
    """A form's name, bytes in memory, seconds to make, and nats a token of each text."""

    def read(made: TaskModel) -> dict[str, float]:
        return {name: nats(made, windows) for name, windows in texts.items()}

    yield "fp32", weight_bytes(model), 0.0, read(model)
    for name, settings in FORMS.items():
        if not fnmatch.fnmatch(name, only):
            continue
        given = {"calibration": calibration} if "method" in settings else {}
        began = perf_counter()
        made = ph.quantize(model, name.split()[0], **settings, **given)
        seconds = perf_counter() - began
        packed = ph.pack(made) if name.startswith("int") else made
        yield f"`{name}`", weight_bytes(packed), seconds, read(packed)
    with tempfile.TemporaryDirectory() as folder:
        yield from theirs(model, texts, only, python, Path(folder))


def theirs(
    model: TaskModel, texts: dict[str, Windows], only: str, python: str, folder: Path
) -> Iterator[tuple[str, int, float, dict[str, float]]]:
    """llama.cpp's own forms of the same weights."""
    kinds = [kind for kind in THEIRS if fnmatch.fnmatch(kind, only)]
    if not kinds:
        return
    path, floats = folder / "model.gguf", str(folder / "floats")
    polyhead(["convert", "smollm2-135m", floats, "--to", "hf"])
    model.save(floats, force=True)
    polyhead(["convert", floats, str(path), "--to", "gguf"])
    try:
        with Worker("llama.cpp", python, torch.get_num_threads(), folder / "log") as worker:
            for kind in kinds:
                began, found = perf_counter(), {}
                for name, windows in texts.items():
                    what = dict(model=str(path), kind=kind, folder=str(folder), windows=windows)
                    worker.ask("open", job="perplexity", options=what)
                    found[name] = worker.ask("answer")["answer"]
                size = (folder / f"model-{kind}.gguf").stat().st_size
                yield f"llama.cpp {kind}", size, perf_counter() - began, found
    except AbsentError as error:
        print(f"| llama.cpp is absent: {error} |")


def stretches(known: Sequence[str] = KNOWN) -> tuple[list[torch.Tensor], dict[str, Windows]]:
    """Token ids to calibrate with `[1, T]` each, as many of each text, and texts held out."""
    tokenizer = ph.tokenizer("smollm2-135m")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def windows(of: list[int], count: int) -> Windows:
        return [of[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]

    def column(path: Path, which: int) -> list[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line.split("\t")[which] for line in lines]

    reviews, verses = column(REVIEWS, -1), column(BIBLE, 0)
    each = CALIBRATION // len(known)
    # Verses of many books, ten thousand away from those that are held out.
    apart = [verses[at : at + 40] for at in range(0, 9000, 9000 // each)][:each]
    read = {
        "reviews": windows(ids("\n".join(reviews[:2000])), each),
        "Bible": [ids("\n".join(some))[:WINDOW] for some in apart],
        "Python": windows(ids(split(pydocs()).train), each),
    }
    held = {"Bible": "\n".join(verses[20000:20600]), "reviews": "\n".join(reviews[3000:])}
    return (
        [torch.tensor([window]) for name in known for window in read[name]],
        {name: windows(ids(text), HELD) for name, text in held.items()},
    )


def nats(model: TaskModel, windows: Windows) -> float:
    """Cross-entropy of all tokens but the first of each window."""
    total = 0.0
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(ids[:, :-1]).float()[0]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return total / len(windows)


@torch.no_grad()
def shuffled(model: TaskModel) -> TaskModel:
    """A Llama with its channels in another order; it answers as it did."""
    torch.manual_seed(0)
    config: Any = model.config
    backbone: Any = model.backbone
    residual = torch.randperm(config.d_model)
    backbone.embedding.weight.copy_(backbone.embedding.weight[:, residual])
    backbone.norm.weight.copy_(backbone.norm.weight[residual])
    for layer in backbone.layers:
        attention, ffn = layer.attention, layer.ffn
        values = torch.randperm(config.head_dim)
        neurons = torch.randperm(config.d_ff)
        for norm in (layer.attention_norm, layer.ffn_norm):
            norm.weight.copy_(norm.weight[residual])
        for reader in (attention.q, attention.k, attention.v, ffn.gate, ffn.up):
            reader.weight.copy_(reader.weight[:, residual])
        for writer in (attention.out, ffn.down):
            writer.weight.copy_(writer.weight[residual])
        v = attention.v.weight.unflatten(0, (-1, config.head_dim))
        attention.v.weight.copy_(v[:, values].flatten(0, 1))
        out = attention.out.weight.unflatten(1, (-1, config.head_dim))
        attention.out.weight.copy_(out[:, :, values].flatten(1))
        for writer in (ffn.gate, ffn.up):
            writer.weight.copy_(writer.weight[neurons])
        ffn.down.weight.copy_(ffn.down.weight[:, neurons])
    return model


if __name__ == "__main__":
    main()
