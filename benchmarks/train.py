"""Training speed of a 10.6 M GPT beside the machine's own matrix product.

Whole steps (forward, backward, clipping, optimizer) of 6 layers, 384 wide, 6 heads, batches of
16 x 256 tokens of a vocabulary of 65, eager. Between the slices of training the fp32 and bf16
products (2048 x 2048 x 2048, two operands in memory) are timed on the same threads, in the order
A B B A; every figure is the median of its slices.

FLOP a token = 6 N + 6 L T E, as `polyhead.train.flops` counts them: N weights that multiply (the
head too, embeddings and learned positions not), and causal attention.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks.abba import slices

import polyhead as ph
from polyhead.kernels.training import fused
from polyhead.train.config import TrainConfig
from polyhead.train.flops import training_flops
from polyhead.train.loop import train_step
from polyhead.train.objectives import LanguageBatch, causal_lm
from polyhead.train.optim import Masters

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, VOCABULARY = 6, 384, 6, 256, 16, 65
TARGET = 0.75


@dataclass(frozen=True)
class Figure:
    """One way to train: tokens and FLOP a second, and its shares of the two products."""

    family: str
    dtype: str
    tokens_per_second: float
    gflops: float
    share_of_fp32: float
    share_of_bf16: float
    low: float
    high: float


def trainer(family: str, dtype: str) -> tuple[Callable[[], None], float]:
    """A function that makes one step, and the FLOP it makes a token."""
    sizes = {"d_model": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "max_seq_len": CONTEXT}
    if family == "llama":  # three matrices of 8/3 E have the weights of two of 4 E
        sizes["d_ff"] = 8 * WIDTH // 3
    model = ph.build(family, seed=0, vocab_size=VOCABULARY, **sizes)
    model.train()
    optimizer = Masters(model, TrainConfig.from_dict({"dtype": dtype}))
    ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    batch = LanguageBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> None:
        with fused(model):
            train_step(model, optimizer, causal_lm, [batch], 1e-3)

    return step, training_flops(model, CONTEXT)


def product(dtype: torch.dtype, size: int = 2048) -> Callable[[], None]:
    """A function that multiplies two square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    return multiply


def run(
    families: list[str], dtypes: list[str], rounds: int, slice_seconds: float
) -> dict[str, Any]:
    torch.manual_seed(0)
    calls: dict[str, Callable[[], None]] = {
        "product float32": product(torch.float32),
        "product bfloat16": product(torch.bfloat16),
    }
    costs = {}
    for family in families:
        for dtype in dtypes:
            calls[f"{family} {dtype}"], costs[family, dtype] = trainer(family, dtype)
    times = slices(calls, rounds, slice_seconds)
    work = 2 * 2048**3
    rates = {
        dtype: [work / t for t in times[f"product {dtype}"]] for dtype in ("float32", "bfloat16")
    }
    figures = []
    for (family, dtype), cost in costs.items():
        tokens = [BATCH * CONTEXT / t for t in times[f"{family} {dtype}"]]
        shares = sorted(
            rate * cost / ceiling for rate, ceiling in zip(tokens, rates["bfloat16"], strict=True)
        )
        speed = statistics.median(tokens)
        figures.append(
            Figure(
                family,
                dtype,
                speed,
                speed * cost / 1e9,
                speed * cost / statistics.median(rates["float32"]),
                statistics.median(shares),
                shares[0],
                shares[-1],
            )
        )
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "product_gflops": {d: statistics.median(r) / 1e9 for d, r in rates.items()},
        "flop_per_token": {family: cost for (family, _), cost in costs.items()},
        "figures": [asdict(figure) for figure in figures],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=("gpt2", "llama", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=8, help="slices of each (default 8)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a slice")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    families = ["gpt2", "llama"] if given.family == "both" else [given.family]
    dtypes = ["float32", "bfloat16"] if given.dtype == "both" else [given.dtype]
    result = run(families, dtypes, given.rounds, given.seconds)
    if given.json:
        print(json.dumps(result))
        return
    print(f"torch {result['torch']}, {result['threads']} threads")
    for dtype, rate in result["product_gflops"].items():
        print(f"matrix product {dtype}: {rate:.0f} GFLOP/s")
    for family, cost in result["flop_per_token"].items():
        print(f"{family}: {cost / 1e6:.1f} MFLOP a token = 6 N + 6 L T E")
    for f in result["figures"]:
        print(
            f"{f['family']:6} {f['dtype']:9} {f['tokens_per_second']:7.0f} tokens/s  "
            f"{f['gflops']:5.0f} GFLOP/s  {f['share_of_fp32']:4.0%} of the fp32 product, "
            f"{f['share_of_bf16']:4.0%} of the bf16 product ({f['low']:.0%} to {f['high']:.0%}; "
            f"target {TARGET:.0%})"
        )


if __name__ == "__main__":
    main()
