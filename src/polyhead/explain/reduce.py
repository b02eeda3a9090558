"""What is kept of attention weights and other things seen, so that those of long texts fit.

B batch, H heads, Q queries, K keys.
"""

from collections.abc import Callable
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
    """`each` of some queries' weights `[B, H, q, K]`, side by side.

    dim: where in what is kept the queries stand; None: what is kept is the sum.
    """

    each: Reduce
    dim: int | None

    def __call__(self, x: Tensor) -> Kept:
        return self.each(x)


class Gathered:
    """What a reduction keeps of queries that come some at a time.

    It is written where it belongs: small tensors kept between large ones would scatter the memory.
    """

    def __init__(self, how: Reduction, num_queries: int) -> None:
        self.how, self.num_queries = how, num_queries
        self.whole: Kept | None = None
        self.filled = 0

    def add(self, weights: Tensor) -> None:
        """The next queries' weights `[B, H, q, K]`."""
        found, count = self.how.each(weights), weights.shape[2]
        parts = (found,) if isinstance(found, Tensor) else found
        if self.whole is None:
            empty = [self._empty(part) for part in parts]
            self.whole = empty[0] if isinstance(found, Tensor) else Top(*empty)
        wholes = (self.whole,) if isinstance(self.whole, Tensor) else self.whole
        for whole, part in zip(wholes, parts, strict=True):
            if self.how.dim is None:
                whole += part
            else:
                whole.narrow(self.how.dim, self.filled, count).copy_(part)
        self.filled += count

    def _empty(self, part: Tensor) -> Tensor:
        if self.how.dim is None:
            return torch.zeros_like(part)
        shape = list(part.shape)
        shape[self.how.dim] = self.num_queries
        return part.new_empty(shape)


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

    return Reduction(each, -2)


NAMED: dict[str, Reduction] = {
    "mean": Reduction(mean_of_heads, 1),
    "entropy": Reduction(entropy, -1),
    "received": Reduction(received, None),
}


def reduction(asked: str | Reduce | None) -> Reduce | None:
    """One by its name: mean (of the heads), entropy, received (by each key), or top-5 and so on."""
    if asked is None or callable(asked):
        return asked
    if asked in NAMED:
        return NAMED[asked]
    count = str(asked).removeprefix("top-")
    if str(asked).startswith("top-") and count.isdecimal():
        return top(int(count))
    raise ConfigError(
        f"reduce is {asked!r}; use {', '.join(NAMED)}, top-5 or another number, or a function"
    )


def check_fit(what: str, how: str | Reduce | None) -> None:
    """ConfigError for a reduction, by name, of what it says nothing of: but for "top-5", all are
    of weights."""
    if isinstance(how, str) and not how.startswith("top-") and what != "weights":
        raise ConfigError(
            f"reduce={how!r} is of attention's weights; of {what} keep 'top-5', or give a function"
        )
