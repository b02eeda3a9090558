"""Whole training runs beside transformers' Trainer, LitGPT and peft: seconds a step.

Every contender trains a fresh model of the same shape on the same threads, with AdamW and clipping,
on rows of the same length, by its own training loop; a slice is a run of a few steps, of which
the first is not counted. Slices come in turn, A B B A. Peers stand at their default and at the
types that may be faster; the ratio that counts is against each peer's fastest. LitGPT takes
part where it can be imported (its loop is `litgpt.pretrain.fit`'s, without torch.compile unless
--compile is given).

gpt      10.6 M: 6 layers, 384 wide, vocabulary 65, 16 x 256 tokens
llama    30 M: 9 layers, 512 wide, vocabulary 4096, 16 x 256 tokens
mixtral  forward and backward alone: 2 layers, 256 wide, 8 experts of which 2, 8 x 256 tokens
lora     rank 16 beside SmolLM2-135M's shapes, 4 x 256 tokens
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarks.abba import product_gflops, ratio, with_itself

import polyhead as ph
from polyhead.adapt.adapters import add_adapter
from polyhead.adapt.lora import LoraConfig
from polyhead.kernels.training import fused
from polyhead.models.model import TaskModel
from polyhead.train.log import read_log
from polyhead.train.objectives import LanguageBatch, causal_lm

Run = Callable[[int], list[float]]
"""Trains for so many steps; when each ended."""


@dataclass(frozen=True)
class Shape:
    """A model and what a step of it sees. goals: of ours against the fastest of Trainer, of all."""

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rows: int
    goals: tuple[float, float]
    context: int = 256
    num_experts: int = 0

    def fields(self) -> dict[str, Any]:
        """Of our config."""
        names = "vocab_size d_model num_layers num_heads".split()
        if self.family != "gpt2":
            names += ["d_ff", "num_kv_heads"]
        more = {"num_experts": self.num_experts} if self.num_experts else {}
        return {name: getattr(self, name) for name in names} | more | {"max_seq_len": self.context}

    def peer(self) -> Any:
        """Transformers' model of the same shape, fresh."""
        return _transformers(ph.build(self.family, **self.fields()).hf_config())


SHAPES = {
    "gpt": Shape("gpt2", 65, 384, 1536, 6, 6, 6, 16, (1.5, 1.15)),
    "llama": Shape("llama", 4096, 512, 1376, 9, 8, 8, 16, (1.5, 1.15)),
    "mixtral": Shape("mixtral", 4096, 256, 896, 2, 8, 4, 8, (1.5, 1.5), num_experts=8),
    "lora": Shape("llama", 49152, 576, 1536, 30, 9, 3, 4, (1.2, 1.2)),
}


def _transformers(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    drop = {"torch_dtype", "dtype", "architectures", "transformers_version"}
    kept = {name: value for name, value in config.items() if name not in drop}
    made = AutoConfig.for_model(**kept)
    made.use_cache = False
    return AutoModelForCausalLM.from_config(made)


def ours(shape: Shape, dtype: str, lora: bool = False) -> Run:
    """Our Trainer on text of as many letters as the vocabulary has."""
    letters = [chr(0x100 + i) for i in range(shape.vocab_size - 4)]
    tokenizer = ph.Tokenizer.train(["".join(letters)], kind="chars")

    def run(steps: int) -> list[float]:
        model = ph.build(shape.family, seed=0, **shape.fields())
        if lora:
            add_adapter(model, LoraConfig(rank=16, alpha=32))
        ends: list[float] = []
        count = shape.rows * shape.context * (steps + 1)
        order = torch.randint(len(letters), (count,)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            config = ph.TrainConfig(
                steps=steps, batch_size=shape.rows, context=shape.context, log_every=1, out=folder,
                held_out=0.0, validate_every=0, checkpoint_every=0, dtype=dtype, device="cpu",
            )  # fmt: skip
            trainer = ph.Trainer(
                model, tokenizer, config, quiet=True,
                callbacks=[lambda *_: ends.append(perf_counter())],
            )  # fmt: skip
            trainer.fit(["".join(letters[i] for i in order)])
            assert len(read_log(Path(folder) / "log.jsonl")) >= steps
        return ends[:steps]

    return run


def theirs(shape: Shape, setting: str, lora: bool = False) -> Run:
    """Transformers' Trainer. setting: float32, autocast or bfloat16."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **more: Any) -> None:
            ends.append(perf_counter())

    def run(steps: int) -> list[float]:
        ends.clear()
        model = shape.peer()
        if setting == "bfloat16":
            model = model.to(torch.bfloat16)
        if lora:
            from peft import LoraConfig as PeftConfig
            from peft import get_peft_model

            told = PeftConfig(r=16, lora_alpha=32, target_modules="all-linear")
            model = get_peft_model(model, told)
        rows = torch.randint(shape.vocab_size, (steps * shape.rows, shape.context))
        data = [{"input_ids": row, "labels": row} for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=shape.rows, max_steps=steps, use_cpu=True,
                bf16=setting == "autocast", save_strategy="no", logging_strategy="no",
                report_to=[], disable_tqdm=True, learning_rate=1e-3,
            )  # fmt: skip
            Trainer(model, arguments, train_dataset=data, callbacks=[Watch()]).train()  # pyright: ignore
        return list(ends)

    return run


def litgpt(shape: Shape, precision: str, compiles: bool) -> Run:
    """The loop of `litgpt.pretrain.fit`."""
    import lightning as L
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    is_llama = shape.family == "llama"
    config = Config(
        name="bench", block_size=shape.context, vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size, n_layer=shape.num_layers, n_head=shape.num_heads,
        n_query_groups=shape.num_kv_heads, n_embd=shape.d_model, rotary_percentage=1.0,
        parallel_residual=False, bias=not is_llama, intermediate_size=shape.d_ff,
        norm_class_name="RMSNorm" if is_llama else "LayerNorm",
        mlp_class_name="LLaMAMLP" if is_llama else "GptNeoxMLP",
    )  # fmt: skip

    def run(steps: int) -> list[float]:
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)  # pyright: ignore
        with fabric.init_module(empty_init=False):
            model = GPT(config)
        model = fabric.setup(torch.compile(model) if compiles else model)
        optimizer = fabric.setup_optimizers(
            torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        )
        ends: list[float] = []
        for _ in range(steps):
            data = torch.randint(shape.vocab_size, (shape.rows, shape.context + 1))
            logits = model(data[:, :-1].contiguous())
            fabric.backward(chunked_cross_entropy(logits, data[:, 1:].contiguous()))
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            ends.append(perf_counter())
        return ends

    return run


def passes(shape: Shape, model: Any) -> Run:
    """Forward and backward alone, by each library's own loss."""
    model.train()
    ids = torch.randint(shape.vocab_size, (shape.rows, shape.context + 1))
    batch = LanguageBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    is_ours = isinstance(model, TaskModel)

    def run(steps: int) -> list[float]:
        ends: list[float] = []
        with fused(model):
            for _ in range(steps):
                if is_ours:
                    loss = causal_lm(model, batch).total
                else:
                    loss = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
                loss.backward()
                model.zero_grad()
                ends.append(perf_counter())
        return ends

    return run


def contenders(name: str, compiles: bool) -> dict[str, Run]:
    """Of a piece of work, by names that begin with whose they are."""
    shape = SHAPES[name]
    if name == "mixtral":
        runs: dict[str, Run] = {}
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            model = ph.build(shape.family, seed=0, **shape.fields()).to(dtype)
            runs[f"ours {kind}"] = passes(shape, model)
            for experts in ("eager", "grouped_mm"):
                peer = shape.peer().to(dtype)
                peer.set_experts_implementation(experts)
                runs[f"transformers {kind} {experts}"] = passes(shape, peer)
        return runs
    lora = name == "lora"
    runs = {f"ours {kind}": ours(shape, kind, lora) for kind in ("float32", "bfloat16")}
    for setting in ("float32", "autocast", "bfloat16"):
        runs[f"transformers {setting}"] = theirs(shape, setting, lora)
    if not lora:
        try:
            for precision in ("bf16-mixed", "bf16-true"):
                runs[f"litgpt {precision}"] = litgpt(shape, precision, compiles)
        except ImportError as error:
            print(f"LitGPT is left out: {error}", file=sys.stderr)
    return runs


def measure(name: str, rounds: int, steps: int, compiles: bool) -> dict[str, Any]:
    """Seconds a step of every contender, and our ratios."""
    shape, runs = SHAPES[name], contenders(name, compiles)
    times: dict[str, list[float]] = {each: [] for each in runs}
    products: list[float] = []
    for turn in range(rounds):
        print(f"{name}: round {turn + 1} of {rounds}", file=sys.stderr)
        products.append(product_gflops(torch.bfloat16))
        for each in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            ends = runs[each](steps + 1)
            times[each].append((ends[-1] - ends[0]) / steps)
    tokens = shape.rows * shape.context
    fastest = {
        owner: min((each for each in times if each.startswith(owner)),
                   key=lambda each: statistics.median(times[each]))
        for owner in dict.fromkeys(each.split()[0] for each in times)
    }  # fmt: skip
    best = fastest.pop("ours")
    return {
        "work": name,
        "threads": torch.get_num_threads(),
        "product_gflops": statistics.median(products),
        "tokens_per_second": {
            each: tokens / statistics.median(found) for each, found in times.items()
        },
        "fastest": best,
        "ratios": {peer: str(ratio(times[peer], times[best])) for peer in times if peer != best},
        "against": fastest,
        "goals": shape.goals,
        "itself": str(with_itself(times[best])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", nargs="*", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument(
        "--rounds", type=int, default=9, help="slices of each, 2 or more (default 9)"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps a slice (default 4)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--compile", action="store_true", help="compile LitGPT's model, as it does")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in given.work or SHAPES:
        found = measure(name, given.rounds, given.steps, given.compile)
        if given.json:
            print(json.dumps(found), flush=True)
            continue
        print(f"{name}: bf16 product {found['product_gflops']:.0f} GFLOP/s")
        for each, speed in found["tokens_per_second"].items():
            against = found["ratios"].get(each, "the fastest of ours")
            print(f"  {each:32} {speed:7.0f} tokens/s   {against}", flush=True)
        print(f"  fastest of peers: {', '.join(found['against'].values())}; goals {found['goals']};"
              f" {found['fastest']} against itself {found['itself']}")  # fmt: skip


if __name__ == "__main__":
    main()
