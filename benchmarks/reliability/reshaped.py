"""What two processes saved, taken up by one and by four."""

from pathlib import Path
from typing import Any

import torch
from benchmarks.reliability.runs import Progress, left, training

from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "fsdp-bfloat16": {"parallel": "fsdp", "dtype": "bfloat16"},
    "fsdp-ema": {"parallel": "fsdp", "ema": 0.9},
    "ddp-muon": {"optimizer": "muon"},
    "fsdp-recompute": {"parallel": "fsdp", "recompute": "blocks"},
}
SAVED, MORE = 12, 6


def reshaped(folder: Path, rounds: int, worlds: tuple[int, ...] = (2, 1, 4)) -> dict[str, Any]:
    """For so many of KINDS: load and save again on 1 and on 4 ranks, which changes no tensor.

    A step that is left out takes up a checkpoint and saves it anew without training. Moments are
    compared by what they do: the steps that one process makes after it are the same.
    """
    progress, faults = Progress("resharding", rounds), list[str]()
    names = list(KINDS)[:rounds]
    for number, name in enumerate(names):
        faults += [f"{name}: {what}" for what in _reshaped(folder / name, KINDS[name], worlds)]
        progress(number + 1)
    return {"ok": not faults, "saved_on": 2, "loaded_on": worlds, "kinds": names, "faults": faults}


def _reshaped(folder: Path, kind: dict[str, Any], worlds: tuple[int, ...]) -> list[str]:
    dtype = getattr(torch, kind.get("dtype", "float32"))
    settings = {**kind, "schedule": "constant", "accumulate": 4, "checkpoint_every": 0}

    def run(out: Path, world: int, steps: int, **told: Any) -> None:
        code = training(out, world, config={**settings, "steps": steps}, **told).wait()
        assert code == 0, f"{out} ended with {code}"

    found: dict[int, Any] = {}
    faults: list[str] = []
    for world in worlds:
        out = folder / str(world)
        run(out, 2, SAVED)
        before = _model(out, dtype)
        run(out, world, SAVED + 1, spoilt=[0])
        after = _model(out, dtype)
        if before.keys() != after.keys() or any(
            not torch.equal(tensor, after[name]) for name, tensor in before.items()
        ):
            faults.append(f"{world} ranks change what they load")
        run(out, 1, SAVED + MORE)
        found[world] = left(out)
    first = found[worlds[0]]
    return faults + [f"{n} ranks go on otherwise" for n in worlds if found[n] != first]


def _model(out: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in the type of the run: several ranks save the float32 that they hold."""
    last = checkpoint.latest(out)
    assert last is not None
    return {name: tensor.to(dtype, copy=True) for name, tensor in open_checkpoint(last).items()}
