"""Disentangled attention: content and distance are two vectors (He et al. 2021, section 3.1).

The score of a query and a key is q·k + q·K(d) + k·Q(d), with d the query's place less the key's, K
and Q a table of distances through the layer's projections. R rows of it, N places, n blocks of s.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.attend import rows_at_once
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Cache
from polyhead.nn.dropout import dropout
from polyhead.nn.embedding import Table
from polyhead.nn.mask import Lowered
from polyhead.nn.position import Position

TERMS = ("c2p", "p2c")
BLOCK = 64

Windows = tuple[Tensor | None, Tensor | None]
"""For queries and for keys, the vectors of the offsets that each block of places meets."""


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
        head_dim: int | None = None,
        terms: tuple[str, ...] = TERMS,
        shares: bool = False,
        key_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim=head_dim, scale=scale, dropout=dropout)
        self.terms, self.shares = terms, shares
        width = self.q.out_features
        if not key_bias:
            self.k = nn.Linear(d_model, width, bias=False)
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

    def weigh(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        position: Position | None,
        at: Tensor,
        keys_at: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """The same, on a CPU a few rows at a time, with the scores in the place of the bias."""
        plain = self.probes or q.device.type != "cpu" or not self.terms
        if plain or not isinstance(position, Distances):
            return super().weigh(q, k, v, mask, position, at, keys_at, cache)
        windows = position.windows(self)
        allowed = mask.boolean(q.shape[2], k.shape[2], q.device)
        rows = rows_at_once(q, k)
        masks = [allowed] * math.ceil(len(q) / rows)
        if allowed is not None and len(allowed) > 1:
            masks = list(allowed.split(rows))
        parts = zip(q.split(rows), k.split(rows), v.split(rows), masks, strict=True)
        found = [self._written_out(a, b, c, windows, own) for a, b, c, own in parts]
        return torch.cat(found) if len(found) > 1 else found[0]

    def _written_out(
        self, q: Tensor, k: Tensor, v: Tensor, windows: Windows, allowed: Tensor | None
    ) -> Tensor:
        scores = distance_scores(q, k, windows)
        assert scores is not None
        scores = scores.flatten(0, 1)
        scores = scores.baddbmm_(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=self.scale)
        scores = scores.unflatten(0, q.shape[:2])
        if allowed is not None:
            scores = scores.masked_fill_(~allowed, torch.finfo(scores.dtype).min)
        found = dropout(scores.softmax(-1), self.dropout, self.training) @ v
        if allowed is None:
            return found
        return found.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


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
        # A scale that ends early climbs fast: a bucket may lie further than its distance.
        self.outruns = buckets is not None and max_distance - 1 < math.e * (buckets // 2)
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
        near = self.span if self.outruns else min(num_tokens, self.span)
        vectors = self.norm(self.table.weight[self.span - near : self.span + near])
        rows = distance_rows(num_tokens, near, self.buckets, self.max_distance)
        return Distances(vectors, rows.to(at.device), self.dropout if self.training else 0.0)

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor | None:
        return self.prepare(at, keys_at, q.dtype).bias(q, k, at, keys_at, attention)


class Distances(Position):
    """The vectors of one forward `[R, E]`, and which of them each distance takes `[2T - 1]`."""

    def __init__(self, vectors: Tensor, rows: Tensor, dropout: float) -> None:
        super().__init__()
        self.vectors, self.rows, self.dropout = vectors, rows, dropout

    def windows(self, attention: DisentangledAttention) -> Windows:
        """What a layer multiplies its queries, and its keys, with; the scale is in them."""
        vectors = dropout(self.vectors, self.dropout) if self.dropout else self.vectors
        keys, queries = attention.keys_of(vectors), attention.queries_of(vectors)
        heads, scale = attention.num_heads, attention.scale
        # A key's offset from the query is -d: the last distance comes first.
        return (
            None if keys is None else _windows(keys * scale, self.rows.flip(0), heads),
            None if queries is None else _windows(queries * scale, self.rows, heads),
        )

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor | None:
        assert isinstance(attention, DisentangledAttention)
        return distance_scores(q, k, self.windows(attention))


def distance_scores(q: Tensor, k: Tensor, windows: Windows) -> Tensor | None:
    """`scale (q·K(d) + k·Q(d))`, `[B, H, T, T]`, of q, k `[B, H, T, D]`; None without a term."""
    of_queries, of_keys = windows
    found: Tensor | None = None
    if of_keys is not None:
        found = _by_offset(k, of_keys).permute(0, 1, 4, 5, 2, 3).contiguous()
    if of_queries is not None:
        seen = _by_offset(q, of_queries)
        # Adding what lies in rows to what lies in columns is slow; the turn was one copy.
        found = seen.contiguous() if found is None else found.add_(seen)
    if found is None:
        return None
    length, size = q.shape[2], found.shape[2] * found.shape[3]
    return found.view(*q.shape[:2], size, size)[:, :, :length, :length]


def _windows(vectors: Tensor, rows: Tensor, heads: int) -> Tensor:
    """The offsets that each block of places meets, `[H, n, (n + 1)s - 1, D]`.

    rows `[2T - 1]` of `vectors` `[R, H D]`, for offsets from 1 - T to T - 1.
    """
    length = (len(rows) + 1) // 2
    blocks = math.ceil(length / BLOCK)
    size = math.ceil(length / blocks)
    spare = blocks * size - length
    rows = F.pad(rows, (spare, spare)) if spare else rows
    # The last block's offsets begin first.
    rows = rows.unfold(0, (blocks + 1) * size - 1, size).flip(0)
    found = F.embedding(rows, vectors).unflatten(2, (heads, -1))
    return found.permute(2, 0, 1, 3).contiguous()


def _by_offset(x: Tensor, windows: Tensor) -> Tensor:
    """Each place's product with the vector of each other's offset, `[B, H, n, s, n, s]`, a view.

    No product is gathered: a block's places are multiplied with the window of offsets that they
    meet, and of these products each row is read one step before the row above it.
    """
    batch, heads, length, width = x.shape
    blocks, window = windows.shape[1:3]
    size = (window + 1) // (blocks + 1)
    x = F.pad(x, (0, 0, 0, blocks * size - length)) if blocks * size > length else x
    x = x.unflatten(2, (blocks, size)).permute(1, 2, 0, 3, 4)
    x = x.reshape(heads * blocks, batch * size, width)
    products = x @ windows.flatten(0, 1).transpose(1, 2)
    block = batch * size * window
    return products.as_strided(
        (batch, heads, blocks, size, blocks, size),
        (size * window, blocks * block, block, window - 1, size, 1),
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
    steps = torch.ceil(far / torch.tensor((max_distance - 1) / half).log() * (half - 1)).long()
    return torch.where(distances.abs() <= half, distances, (steps + half) * distances.sign())
