"""The random numbers of a rank: where they begin, and where a checkpoint left them."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyhead.files.disk import atomic_file
from polyhead.train.ranks import Ranks


def seed(number: int, ranks: Ranks) -> None:
    """Begin all that a reward, a callback or a step may draw from. Ranks that hold layers together
    draw alike, as what lies between the layers must be the same on all."""
    number += ranks.group
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def keep(folder: Path, ranks: Ranks) -> None:
    """Write where the random numbers of this rank's group are."""
    if ranks.rank % ranks.tensor:  # a neighbour has the same
        return
    kind, keys, *rest = np.random.get_state()
    on_gpu = torch.cuda.is_available()
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if on_gpu else None,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    with atomic_file(_file(folder, ranks)) as file:  # flushed by the machine that wrote it
        file.write(json.dumps(state).encode())


def take_up(folder: Path, ranks: Ranks, number: int, step: int) -> None:
    """Go on from where `keep` left this group; one that was not there begins from the seed and the
    step."""
    path = _file(folder, ranks)
    if not path.exists():
        mixed = np.random.SeedSequence((number, step)).generate_state(1, np.uint64)
        seed(int(mixed[0]) >> 2, ranks)
        return
    state = json.loads(path.read_text())
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _file(folder: Path, ranks: Ranks) -> Path:
    return folder / f"random-{ranks.group:05d}.json"


def _bytes(text: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
