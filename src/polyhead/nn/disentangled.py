"""Disentangled attention: content and distance are two vectors (He et al. 2021, section 3.1).

The score of a query and a key is q·k + q·K(d) + k·Q(d), with d the place of the query less that of
the key, and K and Q a table of distances through the layer's projections. R rows of the table, N
places, in n blocks of s.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.embedding import Table
from polyhead.nn.position import Position

TERMS = ("c2p", "p2c")
BLOCK = 64


class DisentangledAttention(MultiHeadAttention):
    """Attention whose layer also projects a table of distances to keys and queries.

    terms:      of "c2p" (content to position: q·K) and "p2c" (position to content: k·Q), those
                that add to the scores.
    shares:     distances go through the projections of the tokens; else through their own.
    key_bias:   whether keys have one, those of distances too.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        terms: tuple[str, ...] = TERMS,
        shares: bool = False,
        key_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, num_heads, scale=scale, dropout=dropout)
        width = num_heads * self.head_dim
        if not key_bias:
            self.k = nn.Linear(d_model, width, bias=False)
        self.terms, self.shares = terms, shares
        if "c2p" in terms and not shares:
            self.distance_k = nn.Linear(d_model, width, bias=key_bias)
        if "p2c" in terms and not shares:
            self.distance_q = nn.Linear(d_model, width)

    def keys_of(self, table: Tensor) -> Tensor | None:
        """Keys of distances: `[R, E]` to `[R, H D]`; None where no query looks at them."""
        if "c2p" not in self.terms:
            return None
        return self.k(table) if self.shares else self.distance_k(table)

    def queries_of(self, table: Tensor) -> Tensor | None:
        """Queries of distances: `[R, E]` to `[R, H D]`; None where no key looks at them."""
        if "p2c" not in self.terms:
            return None
        return self.q(table) if self.shares else self.distance_q(table)


class Disentangled(Position):
    """A learned vector for each distance, read through the projections of every layer.

    span:     how far the table reaches: distances, or buckets of them, from -span to span - 1.
    buckets:  exact up to half of them, logarithmic up to `max_distance`; None: a row a distance.
    norm:     over the rows. dropout: of the rows, anew in every layer.

    Distances count places in the row of a batch, so that padding at either end changes none.
    """

    def __init__(
        self,
        d_model: int,
        span: int,
        buckets: int | None = None,
        max_distance: int = 512,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.span, self.buckets, self.max_distance = span, buckets, max_distance
        self.table = Table(2 * span, d_model)
        self.norm = nn.Identity() if norm is None else norm
        self.dropout = dropout

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        num_tokens = at.shape[1]
        if keys_at.shape[1] != num_tokens:
            raise ValueError(
                f"{num_tokens} queries over {keys_at.shape[1]} keys have no distances here; "
                "disentangled attention wants as many of both"
            )
        # No bucket lies further than its distance.
        near = min(num_tokens, self.span)
        vectors = self.norm(self.table.weight[self.span - near : self.span + near])
        rows = distance_rows(num_tokens, near, self.buckets, self.max_distance)
        dropout = self.dropout if self.training else 0.0
        return _Distances(vectors, rows.to(at.device), dropout)

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor | None:
        return self.prepare(at, keys_at, q.dtype).bias(q, k, at, keys_at, attention)


class _Distances(Position):
    """The vectors of one forward, and which of them each distance takes."""

    def __init__(self, vectors: Tensor, rows: Tensor, dropout: float) -> None:
        super().__init__()
        self.vectors, self.rows, self.dropout = vectors, rows, dropout

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor | None:
        assert isinstance(attention, DisentangledAttention)
        vectors = F.dropout(self.vectors, self.dropout) if self.dropout else self.vectors
        keys, queries = attention.keys_of(vectors), attention.queries_of(vectors)
        return distance_scores(q, k, keys, queries, self.rows, attention.scale)


def distance_scores(
    q: Tensor, k: Tensor, keys: Tensor | None, queries: Tensor | None, rows: Tensor, scale: float
) -> Tensor | None:
    """`scale (q·K(d) + k·Q(d))`, `[B, H, T, T]`; None where there is neither term.

    q, k `[B, H, T, D]`; keys, queries `[R, H D]`; rows `[2T - 1]` for d from 1 - T to T - 1.
    """
    found: Tensor | None = None
    if keys is not None:
        # A key's offset from the query is -d: the last distance comes first.
        found = _by_offset(q * scale, keys, rows.flip(0)).contiguous()
    if queries is not None:
        of_keys = _by_offset(k * scale, queries, rows).permute(0, 1, 4, 5, 2, 3)
        found = of_keys.contiguous() if found is None else found.add_(of_keys)
    if found is None:
        return None
    size, length = found.shape[2] * found.shape[3], q.shape[2]
    return found.view(*q.shape[:2], size, size)[:, :, :length, :length]


def _by_offset(x: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
    """Each place's product with the vector of each other's offset, `[B, H, n, s, n, s]`, a view.

    x `[B, H, T, D]`; rows `[2T - 1]` of `vectors` `[R, H D]` for offsets from 1 - T to T - 1. No
    value is gathered: a block's places are multiplied with the window of offsets that they meet,
    and of these products each row is read one step before the row above it.
    """
    batch, heads, length, width = x.shape
    blocks = math.ceil(length / BLOCK)
    size = math.ceil(length / blocks)
    spare = blocks * size - length
    if spare:
        x, rows = F.pad(x, (0, 0, 0, spare)), F.pad(rows, (spare, spare))
    window = (blocks + 1) * size - 1
    x = x.view(batch, heads, blocks, size, width).permute(2, 1, 0, 3, 4)
    windows = F.embedding(rows.unfold(0, window, size).flip(0), vectors)  # [n, window, H D]
    windows = windows.view(blocks, window, heads, width).permute(0, 2, 3, 1)
    products = x.reshape(blocks, heads, batch * size, width) @ windows
    row, block = batch * size * window, heads * batch * size * window
    return products.as_strided(
        (batch, heads, blocks, size, blocks, size),
        (size * window, row, block, window - 1, size, 1),
        products.storage_offset() + size - 1,
    )


@lru_cache(64)
def distance_rows(num_tokens: int, near: int, buckets: int | None, max_distance: int) -> Tensor:
    """Which of 2·near rows each distance takes, from 1 - T to T - 1: `[2T - 1]` on the CPU."""
    distances = torch.arange(1 - num_tokens, num_tokens, device="cpu")
    if buckets is not None:
        distances = log_buckets(distances, buckets, max_distance)
    return (distances + near).clamp(0, 2 * near - 1)


def log_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Distances, exact to half of the buckets, then on a log scale that ends at `max_distance`."""
    half = buckets // 2
    far = (distances.abs().clamp(min=half) / half).log()
    steps = torch.ceil(far / torch.tensor((max_distance - 1) / half).log() * (half - 1))
    far = (steps.long() + half) * distances.sign()
    return torch.where(distances.abs() <= half, distances, far)
