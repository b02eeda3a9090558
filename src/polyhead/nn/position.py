"""Positions: what turns queries and keys, and what adds to the scores.

Everything called relative position fits two seams, `rotate` and `bias`. `at` `[B|1, T]` holds the
positions of the queries and `keys_at` `[B|1, K]` those of the keys. Whoever owns a table passes the
part to attention; `prepare` computes once a forward what depends on positions alone.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyhead.nn.embedding import Table

if TYPE_CHECKING:
    from polyhead.nn.attention import MultiHeadAttention


class Position(nn.Module):
    """A position that does nothing; the others override what they need."""

    rotates_late = False  # keys are cached as they are and rotated when read
    has_values = False  # adds to what the weights sum, so the weights must be at hand

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> "Position":
        """The same position with all that depends on `at` and `keys_at` computed, for `dtype`."""
        return self

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """Queries or keys `[B, H, T, D]`, turned by their positions."""
        return x

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: "MultiHeadAttention"
    ) -> Tensor | None:
        """What is added to the scaled scores, `[B|1, H|1, Q, K]`."""
        return None

    def values(self, weights: Tensor, at: Tensor, keys_at: Tensor) -> Tensor:
        """What is added to the weighted values, `[B, H, Q, D]`; asked for if `has_values`."""
        raise NotImplementedError


class PreparedBias(Position):
    """A bias of one forward."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: "MultiHeadAttention"
    ) -> Tensor:
        return self.table.to(q.dtype)


class Alibi(Position):
    """A slope for each head times the distance (Press et al. 2022). slopes: None: the paper's."""

    def __init__(self, num_heads: int, slopes: Sequence[float] | None = None) -> None:
        super().__init__()
        self.num_heads, self.slopes = num_heads, slopes

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        return PreparedBias(self.table(at, keys_at).to(dtype))

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: "MultiHeadAttention"
    ) -> Tensor:
        return self.table(at, keys_at).to(q.dtype)

    def table(self, at: Tensor, keys_at: Tensor) -> Tensor:
        """`-slope |q - k|`, `[B|1, H, Q, K]` fp32."""
        distance = (at[:, :, None] - keys_at[:, None, :]).abs()
        slopes = alibi_slopes(self.num_heads) if self.slopes is None else torch.tensor(self.slopes)
        return -slopes.to(at.device)[:, None, None] * distance[:, None].float()


def alibi_slopes(num_heads: int) -> Tensor:
    """Powers of `2^(-8/n)`; heads beyond a power of two take every second step of twice as many."""
    whole = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return torch.tensor(slopes)


class T5Bias(Position):
    """A learned bias for each head and bucket of key - query (Raffel et al. 2020, section 2.1)."""

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = Table(num_buckets, num_heads)

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        return PreparedBias(self.biases(at, keys_at).to(dtype))

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: "MultiHeadAttention"
    ) -> Tensor:
        return self.biases(at, keys_at).to(q.dtype)

    def biases(self, at: Tensor, keys_at: Tensor) -> Tensor:
        """`[B|1, H, Q, K]`."""
        return self.table(self.buckets(keys_at[:, None, :] - at[:, :, None])).permute(0, 3, 1, 2)

    def buckets(self, distance: Tensor) -> Tensor:
        """Buckets of key - query: exact when near, logarithmic up to `max_distance`."""
        buckets, offset = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = math.log(self.max_distance / exact)
        far = (distance.clamp(min=1).float() / exact).log() / ratio * (buckets - exact)
        far = (exact + far.long()).clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)


class Shaw(Position):
    """Learned vectors for clipped distances, added to keys and to values (Shaw et al. 2018)."""

    has_values = True

    def __init__(self, head_dim: int, max_distance: int) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.keys = Table(2 * max_distance + 1, head_dim)
        self.for_values = Table(2 * max_distance + 1, head_dim)

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: "MultiHeadAttention"
    ) -> Tensor:
        by_distance = q @ self.keys.weight.T * attention.scale  # [B, H, Q, 2m+1]
        index = self._index(at, keys_at)[:, None].expand(*q.shape[:3], -1)
        return by_distance.gather(-1, index)

    def values(self, weights: Tensor, at: Tensor, keys_at: Tensor) -> Tensor:
        index = self._index(at, keys_at)[:, None].expand_as(weights)
        by_distance = weights.new_zeros(*weights.shape[:3], 2 * self.max_distance + 1)
        by_distance = by_distance.scatter_add(-1, index, weights)
        return by_distance @ self.for_values.weight

    def _index(self, at: Tensor, keys_at: Tensor) -> Tensor:
        distance = keys_at[:, None, :] - at[:, :, None]
        return distance.clamp(-self.max_distance, self.max_distance) + self.max_distance


class LearnedPositions(Table):
    """An embedding for each absolute position, added to the tokens': `[B|1, T, E]`.

    A position beyond the table raises ValueError on the CPU, where looking costs nothing.
    """

    def forward(self, index: Tensor) -> Tensor:
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = int(index.max()) + 1
            if longest > len(self.weight):
                raise ValueError(
                    f"{longest} tokens are more than this model's {len(self.weight)} positions; "
                    "shorten the text"
                )
        return super().forward(index.clamp(min=0))


class SinusoidalPositions(nn.Module):
    """Sines and cosines, interleaved (Vaswani et al. 2017, section 3.5): `[B|1, T, E]` fp32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, at: Tensor) -> Tensor:
        half = torch.arange(0, self.d_model, 2, device=at.device)
        turns = at[..., None].float() * (10000.0 ** (-half.float() / self.d_model))
        return torch.stack([turns.sin(), turns.cos()], dim=-1).flatten(-2)[..., : self.d_model]


class MarianPositions(SinusoidalPositions):
    """All sines, then all cosines, as Marian's files store them (Junczys-Dowmunt et al. 2018)."""

    def forward(self, at: Tensor) -> Tensor:
        half = torch.arange(0, self.d_model, 2, device=at.device, dtype=torch.float64)
        turns = at[..., None] * (10000.0 ** (-half / self.d_model))
        return torch.cat([turns.sin(), turns.cos()[..., : self.d_model // 2]], dim=-1).float()
