"""Key/value caches: one a layer, passed in by the caller, each owning its offset.

Rows of a batch may differ in length. `at` `[B, T]` holds the position of every new token, -1 on
padding, which is never kept. Row `b` holds positions `0 .. lengths[b] - 1`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.nn.attend import attend
from polyhead.nn.mask import Lowered, Mask


class Cache:
    """What attention asks of a cache. Keys and values are `[B, G, T, D]`."""

    k: Tensor  # the buffers, whose first dimension are the rows
    v: Tensor
    lengths: Tensor  # [B] int64, tokens held; `Caches` shares one tensor among the layers
    uniform: int | None = None  # the length of all rows, where the host knows it
    is_open = False  # between `Caches.begin` and `Caches.end`

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; return all that may be attended to."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        bias: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """What queries `[B, H, T, D]` find in what `append` returned, of the same shape.

        A cache that lies otherwise than in one piece a row knows a better way.
        """
        return attend(q, k, v, mask, bias, scale, dropout)

    def keys_at(self, at: Tensor) -> Tensor:
        """Positions `[B|1, K]` of what `append` returns for `at`; empty slots may have any."""
        raise NotImplementedError

    def place(self, mask: Mask, at: Tensor) -> Mask:
        """The mask for new tokens `at` over what `append` returns."""
        offset = self.lengths if self.uniform is None else self.uniform
        if mask.causal:
            return mask.placed(offset)
        # A mask that is not causal must be told how far each row reaches.
        last = torch.maximum(self.lengths - 1, at.max(1).values)[:, None]
        slots = self.keys_at(at)
        return mask.placed(offset, torch.where(slots <= last, slots, -1))

    def reserve(self, length: int) -> None:
        """Make room for rows of `length`; raises ValueError where there is none."""

    def check_truncation(self) -> None:
        """Raise ValueError where going back to fewer tokens would not leave them as they were."""

    def select(self, rows: Tensor) -> None:
        """Hold these rows `[N]` of what is held, in their order; a row may come several times."""
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)


class StaticCache(Cache):
    """Buffers of `max_len` positions, allocated once: a decode step has fixed shapes."""

    def __init__(
        self, batch: int, num_kv_heads: int, head_dim: int, max_len: int, like: Tensor
    ) -> None:
        self.max_len = max_len
        # One slot more than is read: padding has position -1, which is that slot.
        shape = (batch, num_kv_heads, max_len + 1, head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        write(self.k, self.v, k, v, at)
        return self.k[:, :, :-1], self.v[:, :, :-1]

    def keys_at(self, at: Tensor) -> Tensor:
        return torch.arange(self.max_len, device=at.device)[None]

    def reserve(self, length: int) -> None:
        if length > self.max_len:
            raise ValueError(f"{length} tokens do not fit a static cache of {self.max_len}")


class GrowingCache(Cache):
    """Buffers that double when they are full; what is returned is as long as the longest row."""

    def __init__(self, batch: int, num_kv_heads: int, head_dim: int, like: Tensor) -> None:
        self.k = like.new_zeros(batch, num_kv_heads, 1, head_dim)
        self.v = like.new_zeros(batch, num_kv_heads, 1, head_dim)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.longest = 0

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        if self.uniform is None or self.longest - self.uniform != k.shape[2]:
            write(self.k, self.v, k, v, at)
        else:
            self.k[:, :, self.uniform : self.longest] = k
            self.v[:, :, self.uniform : self.longest] = v
        return self.k[:, :, : self.longest], self.v[:, :, : self.longest]

    def keys_at(self, at: Tensor) -> Tensor:
        return torch.arange(self.longest, device=at.device)[None]

    def reserve(self, length: int) -> None:
        self.longest = length
        capacity = self.k.shape[2] - 1
        if length > capacity:
            self.k, self.v = (_grown(x, max(length, 2 * capacity)) for x in (self.k, self.v))


class CrossCache(Cache):
    """Keys and values of a memory that does not change: projected once, read at every step."""

    held: tuple[Tensor, Tensor] | None = None

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Hold these; returns them."""
        self.held = (k, v)
        return self.held

    def select(self, rows: Tensor) -> None:
        if self.held is not None:
            k, v = self.held
            self.held = (k.index_select(0, rows), v.index_select(0, rows))


class Caches(Sequence[Cache]):
    """The caches of a model's layers, advancing together.

    `lengths` `[B]` int64 is one tensor shared by all layers and changed in place.
    `cross` holds the cross-attention caches of an encoder-decoder, one a layer.
    """

    def __init__(self, layers: Sequence[Cache], cross: Sequence[CrossCache] = ()) -> None:
        self.layers, self.cross = list(layers), list(cross)
        self.lengths = self.layers[0].lengths
        self.is_static = any(isinstance(layer, StaticCache) for layer in layers)
        # Host-side lengths let a growing cache choose its shapes without asking the device.
        for layer in self.layers:
            layer.lengths = self.lengths
        self.sync()

    def __getitem__(self, index: int) -> Cache:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def begin(self, num_tokens: int, keep: Tensor | None = None) -> Tensor:
        """Positions `[B, T]` of the next tokens, -1 where `keep` is false; makes room for them.

        keep `[B, T]` must be padded on the right; otherwise ValueError.
        """
        self._counts: Tensor | int = num_tokens
        steps = torch.arange(num_tokens, device=self.lengths.device)
        at = self.lengths[:, None] + steps
        if keep is not None:
            self._counts = keep.sum(1)
            if not torch.equal(keep, steps < self._counts[:, None]):
                raise ValueError("pad on the right: with a cache, a row's tokens come first")
            at = torch.where(keep, at, -1)
        if not torch.compiler.is_compiling():
            longest = max(self._after())
            for layer in self.layers:
                layer.reserve(longest)
        for layer in self.layers:
            layer.is_open = True
        return at

    def end(self) -> None:
        """Count the tokens that `begin` placed as held."""
        for layer in self.layers:
            layer.is_open = False
        self.lengths.add_(self._counts)
        if not torch.compiler.is_compiling():
            self._rows = self._after()
            self._know()

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Go back to `lengths` `[B]` tokens a row; what comes next overwrites the rest."""
        self.sync()
        kept: list[int] = torch.as_tensor(lengths).tolist()
        if any(new > old or new < 0 for new, old in zip(kept, self._rows, strict=True)):
            raise ValueError(f"cannot truncate rows of {self._rows} tokens to {kept}")
        if kept != self._rows:
            for layer in self.layers:
                layer.check_truncation()
        self.lengths.copy_(torch.tensor(kept))
        self.sync()

    def select(self, rows: Sequence[int], memories: Sequence[int] | None = None) -> None:
        """Go on with these rows, in their order; a row may come several times.

        memories: rows of the cross-attention caches, each of which serves an equal share of the
        rows; None leaves them as they are.
        """
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[index]
        for layer in self.layers:
            layer.select(index)
            layer.lengths = self.lengths
        if memories is not None:
            for cross in self.cross:
                cross.select(torch.tensor(memories, device=index.device))
        self._rows = [self._rows[row] for row in rows]
        self._know()

    def sync(self) -> None:
        """Learn the lengths from the device, after compiled or recorded steps changed them."""
        self._rows: list[int] = self.lengths.tolist()
        for layer in self.layers:
            layer.reserve(max(self._rows))
        self._know()

    def _after(self) -> list[int]:
        """The rows' lengths once the tokens that `begin` placed are held."""
        counts = self._counts
        added = [counts] * len(self._rows) if isinstance(counts, int) else counts.tolist()
        return [row + count for row, count in zip(self._rows, added, strict=True)]

    def _know(self) -> None:
        even = not self.is_static and len(set(self._rows)) == 1
        for layer in self.layers:
            layer.uniform = self._rows[0] if even else None


def write(k_into: Tensor, v_into: Tensor, k: Tensor, v: Tensor, at: Tensor) -> None:
    """Put new keys and values into the slots `at` `[B, T]`; slot -1 is read by nobody."""
    rows = torch.arange(len(at), device=at.device)[:, None]
    k_into[rows, :, at] = k.transpose(1, 2)
    v_into[rows, :, at] = v.transpose(1, 2)


def _grown(x: Tensor, capacity: int) -> Tensor:
    wider = x.new_zeros(*x.shape[:2], capacity + 1, x.shape[3])
    wider[:, :, : x.shape[2] - 1] = x[:, :, :-1]
    return wider
