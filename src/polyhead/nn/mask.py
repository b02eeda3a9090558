"""Which keys a query may see: one predicate, and every lowering of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(b, h, q, k)` index tensors, broadcastable, to a boolean tensor: may query q see key k?"""


@dataclass(frozen=True)
class Lowered:
    """A mask made ready for one shape of attention: nothing at all, a flag, or a boolean tensor."""

    is_causal: bool = False
    dense: Tensor | None = None  # [B|1, H|1, Q, K], true where a query may see a key

    def boolean(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """The boolean tensor `[B|1, H|1, Q, K]`, or None where every query sees every key."""
        if not self.is_causal:
            return self.dense
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()[None, None]

    def rows(self, begin: int, end: int, num_keys: int, device: torch.device) -> Tensor | None:
        """The boolean tensor's queries from `begin` to `end`."""
        if self.is_causal:
            q, k = (torch.arange(*span, device=device) for span in ((begin, end), (0, num_keys)))
            return (k <= q[:, None])[None, None]
        if self.dense is None or self.dense.shape[2] == 1:
            return self.dense
        return self.dense[:, :, begin:end]

    def repeated(self, times: int) -> "Lowered":
        """The same for rows that each come so many times, side by side."""
        if self.dense is None or len(self.dense) == 1:
            return self
        return Lowered(dense=self.dense.repeat_interleave(times, 0))


EVERYTHING = Lowered()


@dataclass(frozen=True, eq=False)
class Mask:
    """A value that says which keys a query may see; masks join with `&` and `|`.

    causal:   a query sees no later position.
    window:   a query sees positions less than `window` away; the token itself counts.
    keep:     `[B|1, K]` bool, false on padding.
    segments: `[B|1, T]` integers; a query sees its own segment alone (packing, shifted windows).
    allow:    any further predicates over positions; all must hold.
    heads:    how many heads the predicates tell apart; 1 where they do not look at `h`.
    rows:     how many rows of the batch the predicates tell apart; 1 where they ignore `b`.
    offset:   the position of query 0, a number or one for each row `[B]` (what a cache holds).
    keys:     `[B|1, K]` the position of each key slot, -1 where it is empty; None means 0, 1, 2 ...
    """

    causal: bool = False
    window: int | None = None
    keep: Tensor | None = None
    segments: Tensor | None = None
    allow: tuple[Predicate, ...] = ()
    heads: int = 1
    rows: int = 1
    offset: int | Tensor = 0
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; it counts the token itself: use 1 or more")

    def allows(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The definition: true where query `q` of row `b` and head `h` may see key slot `k`."""
        q_at = q + (self.offset if isinstance(self.offset, int) else _rows(self.offset, b))
        k_at = k if self.keys is None else _rows(self.keys, b, k)
        seen = k_at >= 0
        if self.causal:
            seen = seen & (k_at <= q_at)
        if self.window is not None:
            seen = seen & ((q_at - k_at).abs() < self.window)
        if self.keep is not None:
            seen = seen & _rows(self.keep, b, k)
        if self.segments is not None:
            seen = seen & _same_segment(self.segments)(b, h, q, k)
        for predicate in self.allow:
            seen = seen & predicate(b, h, q_at, k_at)
        return seen

    def __and__(self, other: "Mask") -> "Mask":
        """What both allow."""
        allow = self.allow + other.allow
        segments = self.segments
        if segments is None:
            segments = other.segments
        elif other.segments is not None:
            allow = (*allow, _same_segment(other.segments))
        return Mask(
            causal=self.causal or other.causal,
            window=_least(self.window, other.window),
            keep=_both(self.keep, other.keep),
            segments=segments,
            allow=allow,
            heads=max(self.heads, other.heads),
            rows=max(self.batch, other.batch),
            offset=_agreed_offset(self, other),
            keys=self.keys if other.keys is None else other.keys,
        )

    def __or__(self, other: "Mask") -> "Mask":
        """What either allows. Joins must come before a cache places the mask."""
        if self.is_placed or other.is_placed:
            raise ValueError("masks join with | before they are placed over a cache, not after")

        def either(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.allows(b, h, q, k) | other.allows(b, h, q, k)

        heads, rows = max(self.heads, other.heads), max(self.batch, other.batch)
        return Mask(allow=(either,), heads=heads, rows=rows)

    @property
    def batch(self) -> int:
        """How many rows it tells apart; 1 where it says the same of all."""
        owners = (self.keep, self.segments, self.keys, self.offset)
        return max([self.rows, *(len(owner) for owner in owners if isinstance(owner, Tensor))])

    @property
    def is_placed(self) -> bool:
        """Whether queries or key slots were given positions of their own."""
        return self.keys is not None or not isinstance(self.offset, int) or self.offset != 0

    @property
    def is_order_alone(self) -> bool:
        """Whether nothing but positions decides: no padding, no segments, no predicates."""
        return self.keep is None and self.segments is None and not self.allow

    def placed(self, offset: int | Tensor, keys: Tensor | None = None) -> "Mask":
        """The same mask for queries that start at `offset`, over key slots at positions `keys`."""
        return replace(self, offset=offset, keys=keys)

    def lower(self, num_queries: int, num_keys: int, device: torch.device) -> Lowered:
        """The cheapest form that says the same for `Q` queries over `K` keys."""
        if self.is_order_alone and self.keys is None and isinstance(self.offset, int):
            last = self.offset + num_queries - 1
            wide = self.window is None or self.window > max(last, num_keys - 1)
            if wide and (not self.causal or self.offset >= num_keys - 1):
                return EVERYTHING
            # The fused kernel's flag aligns queries and keys at the top left.
            if wide and self.offset == 0 and num_queries == num_keys:
                return Lowered(is_causal=True)
        return Lowered(dense=self.dense(num_queries, num_keys, device))

    def dense(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """The predicate as a boolean tensor, `[B|1, heads, Q, K]`."""
        batch = self.batch
        b = torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(self.heads, device=device)[:, None, None]
        q = torch.arange(num_queries, device=device)[:, None]
        k = torch.arange(num_keys, device=device)
        return self.allows(b, h, q, k).expand(batch, self.heads, num_queries, num_keys)

    def mask_mod(self) -> Predicate:
        """The predicate as the plain function that `flex_attention.create_block_mask` wants."""

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.allows(b, h, q, k)

        return allowed

    def cu_seqlens(self, num_tokens: int) -> Tensor:
        """Ends of the runs that attend among themselves, `[runs + 1]` int32, for ragged kernels.

        From `segments` (each maximal run of one value) or `keep` (each row's kept tokens, which
        the kernel reads with the padding taken out), else one run a row of `num_tokens`.
        """
        if self.allow or self.is_placed or (self.segments is not None and self.keep is not None):
            raise ValueError("only segments, or padding, lower to cu_seqlens; use dense()")
        if self.segments is not None:
            rows, length = self.segments.shape
            starts = torch.ones(rows, length, dtype=torch.bool, device=self.segments.device)
            starts[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
            ends = torch.tensor([rows * length], device=self.segments.device)
            return torch.cat([starts.flatten().nonzero().flatten(), ends]).to(torch.int32)
        if self.keep is not None:
            lengths = self.keep.sum(1)
        else:
            lengths = torch.tensor([num_tokens])
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def _same_segment(segments: Tensor) -> Predicate:
    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _rows(segments, b, q) == _rows(segments, b, k)

    return same


def _rows(table: Tensor, b: Tensor, *indices: Tensor) -> Tensor:
    """`table[b, ...]`, where a table of one row serves every row of the batch."""
    return table[(b if len(table) > 1 else 0 * b, *indices)]


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one & other


def _agreed_offset(one: Mask, other: Mask) -> int | Tensor:
    if one.is_placed and other.is_placed and one.offset is not other.offset:
        raise ValueError("masks placed at different offsets do not join; place them after joining")
    return one.offset if one.is_placed else other.offset


def as_mask(attention_mask: "Tensor | Mask | None", shape: torch.Size) -> Mask:
    """A `Mask` from what a user passes: `[B, T]` with 1 where a token counts, a Mask, or None.

    shape: the `[B, T]` it speaks of; another one raises ValueError.
    """
    if attention_mask is None:
        return Mask()
    if isinstance(attention_mask, Mask):
        return attention_mask
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:  # pyright: ignore[reportUnnecessaryIsInstance]
        given = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise ValueError(
            f"attention_mask is {given if isinstance(given, str) else list(given)} for tokens "
            f"{list(shape)}; pass a tensor of that shape with 1 where a token counts, or a Mask"
        )
    keep = attention_mask != 0
    # A mask that hides nothing keeps attention on its fastest path; a compiler cannot look.
    if not torch.compiler.is_compiling() and bool(keep.all()):
        return Mask()
    return Mask(keep=keep)
