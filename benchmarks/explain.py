"""What looking costs: a forward with one layer captured beside the same forward without.

SmolLM2-135M reads 512 tokens, in float32, bf16 and packed for this CPU. Times by pairs in turn,
plain against plain among them (the noise); memory is what a forward holds at most beside what was
there. A line of JSON for each.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from benchmarks.abba import memory_of, ratio, slices

import polyhead as ph

MODEL = "smollm2-135m"
TOKENS = 512
LAYER = "layers.12"
KINDS = ("float32", "bfloat16", "packed bfloat16", "packed int8")
Look = Callable[[Any], AbstractContextManager[Any]]
LOOKS: dict[str, Look] = {
    "plain": lambda model: nullcontext(),
    "weights of one layer": lambda model: ph.capture(model, LAYER),
    "entropy of one layer": lambda model: ph.capture(model, LAYER, reduce="entropy"),
    "top 5 of one layer": lambda model: ph.capture(model, LAYER, reduce="top-5"),
    "queries of one layer": lambda model: ph.capture(model, LAYER, "queries"),
    "residual of one layer": lambda model: ph.capture(model, LAYER, "residual"),
    "a head knocked out": lambda model: ph.knock_out(model, [(12, 3)]),
    "entropy of every layer": lambda model: ph.capture(model, reduce="entropy"),
    "weights of every layer": lambda model: ph.capture(model),
}


def made(kind: str) -> Any:
    name = kind.split()[-1]
    model = ph.load(MODEL, dtype="bfloat16" if name == "int8" else name)
    model = ph.quantize(model, "int8") if name == "int8" else model
    return ph.pack(model) if kind.startswith("packed") else model.eval()


def forward(model: Any, look: Look) -> None:
    with torch.inference_mode(), look(model):
        model(IDS)


def layers(model: Any, look: Look) -> None:
    """Without the logits, which hide what the layers take: 512 tokens, 49,152 words."""
    with torch.inference_mode(), look(model):
        model.backbone(IDS)


IDS = torch.randint(0, 49152, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def measure(kind: str, rounds: int) -> None:
    model = made(kind)
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    calls = {name: partial(forward, model, look) for name, look in LOOKS.items()}
    taken = slices({**calls, "plain again": calls["plain"]}, rounds, 0.5, quiet=True)
    held = {name: memory_of(call) for name, call in calls.items()}
    alone = {name: memory_of(partial(layers, model, look)) for name, look in LOOKS.items()}
    for name, seconds in taken.items():
        line: dict[str, Any] = {"model": kind, "looking at": name}
        line["ms"] = round(1000 * statistics.median(seconds), 1)
        line["times as long"] = str(ratio(seconds, taken["plain"]))
        if name in held:
            line["MiB"] = round(held[name], 1)
            line["of the plain forward's"] = round(held[name] / held["plain"], 2)
            line["MiB without logits"] = round(alone[name], 1)
            whole = weights / 2**20 + held["plain"]
            line["with the weights"] = round((weights / 2**20 + held[name]) / whole, 3)
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    for kind in asked.kinds:
        measure(kind, asked.rounds)


if __name__ == "__main__":
    main()
