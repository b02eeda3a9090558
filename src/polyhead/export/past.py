"""Keys and values as a runtime hands them in and takes them out: tensors, one pair a layer.

`P` tokens are past, `T` are new, `[B, P + T]` is the mask of both, 1 where a token counts. Padding
may stand at either end of a row, and in the past.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polyhead.nn.cache import Cache, Caches, CrossCache
from polyhead.nn.mask import Mask, Predicate


class GivenCache(Cache):
    """A layer's past keys and values `[B, G, P, D]`, None for none; afterwards those of all."""

    is_open = True

    def __init__(self, past: tuple[Tensor, Tensor] | None, counts: Tensor) -> None:
        self.held = past
        self.keep = counts != 0
        self.positions = positions(counts)

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is not None:
            k, v = torch.cat([self.held[0], k], 2), torch.cat([self.held[1], v], 2)
        self.held = (k, v)
        return k, v

    def keys_at(self, at: Tensor) -> Tensor:
        return self.positions

    def place(self, mask: Mask, at: Tensor) -> Mask:
        """Order is that of the slots, but a window counts the tokens that count."""
        if mask.window is not None:
            near = _near(mask.window, self.positions)
            mask = replace(mask, window=None, allow=(*mask.allow, near), rows=len(self.positions))
        return replace(mask, keep=self.keep).placed(self.keep.shape[1] - at.shape[1])


class GivenCaches(Caches):
    """All layers' caches under one mask `[B, P + T]`."""

    def __init__(
        self,
        counts: Tensor,
        past: Sequence[tuple[Tensor, Tensor] | None],
        cross: Sequence[CrossCache] = (),
    ) -> None:
        self.layers = [GivenCache(pair, counts) for pair in past]
        self.cross = list(cross)
        self.lengths = counts.sum(1)
        self.positions = positions(counts)

    def begin(self, num_tokens: int, keep: Tensor | None = None) -> Tensor:
        """Positions `[B, T]` of the new tokens."""
        return self.positions[:, -num_tokens:]

    def end(self) -> None:
        """Nothing is counted: the next step brings its own mask."""

    def present(self) -> Iterator[Tensor]:
        """Keys and values of all tokens, layer by layer."""
        for layer in self.layers:
            assert layer.held is not None
            yield from layer.held


def positions(counts: Tensor) -> Tensor:
    """The position of each token `[B, K]`, padding not counted."""
    return (counts.cumsum(1) - 1).clamp(min=0)


def _near(window: int, positions: Tensor) -> Predicate:
    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (positions[b, q] - positions[b, k]).abs() < window

    return near
