"""What is kept of attention weights and other things seen, so that those of long texts fit.

B batch, H heads, Q queries, K keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.errors import ConfigError


class Top(NamedTuple):
    """The largest values along the last dimension, falling, and where they stand: `[..., k]`."""

    values: Tensor
    indices: Tensor


Kept = Tensor | Top
Reduce = Callable[[Tensor], Kept]


@dataclass(frozen=True)
class Reduction:
    """`each` of some queries' weights `[B, H, q, K]`, and `join` of what was kept of them all."""

    each: Reduce
    join: Callable[[Sequence[Kept]], Kept]

    def __call__(self, x: Tensor) -> Kept:
        return self.join([self.each(x)])


def mean_of_heads(weights: Tensor) -> Tensor:
    """`[B, H, Q, K]` to `[B, Q, K]`."""
    return weights.float().mean(1)


def entropy(weights: Tensor) -> Tensor:
    """In nats, along the last dimension: `[..., K]` to `[...]`."""
    weights = weights.float()
    return -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)


def received(weights: Tensor) -> Tensor:
    """What each key is given by all queries together: `[B, H, Q, K]` to `[B, H, K]`."""
    return weights.float().sum(2)


def top(k: int) -> Reduction:
    """The k largest: `[..., K]` to `Top` of `[..., k]`."""
    if k < 1:
        raise ConfigError(f"top-{k} keeps nothing; ask for top-1 or more")

    def each(x: Tensor) -> Top:
        return Top(*x.topk(min(k, x.shape[-1])))

    return Reduction(each, lambda parts: Top(*(torch.cat(own, -2) for own in zip(*parts))))  # noqa: B905


NAMED: dict[str, Reduction] = {
    "mean": Reduction(mean_of_heads, lambda parts: torch.cat(_tensors(parts), 1)),
    "entropy": Reduction(entropy, lambda parts: torch.cat(_tensors(parts), -1)),
    "received": Reduction(received, lambda parts: torch.stack(_tensors(parts)).sum(0)),
}


def reduction(asked: str | Reduce | None) -> Reduce | None:
    """One by its name: mean (of the heads), entropy, received (by each key), or top-5 and so on."""
    if not isinstance(asked, str):
        return asked
    if asked in NAMED:
        return NAMED[asked]
    count = asked.removeprefix("top-")
    if asked.startswith("top-") and count.isdigit():
        return top(int(count))
    raise ConfigError(
        f"reduce is {asked!r}; use {', '.join(NAMED)}, top-5 or another number, or a function"
    )


def _tensors(parts: Sequence[Kept]) -> list[Tensor]:
    return [part for part in parts if isinstance(part, Tensor)]
