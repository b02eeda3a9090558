"""Multi-head attention: self or cross, with one, some or all key/value heads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyhead.nn.attend import attend
from polyhead.nn.cache import Cache, Caches, CrossCache
from polyhead.nn.mask import Lowered, Mask
from polyhead.nn.position import Position
from polyhead.nn.probe import Probe, attend_seen


class MultiHeadAttention(nn.Module):
    """Attention by heads (Vaswani et al. 2017, section 3.2.2).

    num_kv_heads: fewer key/value heads than query heads (GQA; 1 is MQA). None: as many.
    head_dim:     None: d_model / num_heads. kv_dim: width of the memory, None: d_model.
    scale:        on the scores, None: head_dim ** -0.5.
    qk_norm:      makes the norm of queries and of keys from (heads, head_dim); it sees
                  `[B, T, heads, head_dim]`.
    dropout:      on the weights, while training.

    What owns no parameter is an argument of the call. `probes` look in from outside; only a layer
    that has some which need its weights computes them.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        scale: float | None = None,
        qk_norm: Callable[[int, int], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}"
            )
        if head_dim is None:
            if d_model % num_heads:
                raise ValueError(
                    f"d_model {d_model} does not divide into {num_heads} heads; name a head_dim"
                )
            head_dim = d_model // num_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.dropout = dropout
        source = d_model if kv_dim is None else kv_dim
        self.q = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(source, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(source, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(
            num_heads * head_dim, d_model, bias=bias if out_bias is None else out_bias
        )
        self.q_norm = qk_norm(num_heads, head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(num_kv_heads, head_dim) if qk_norm else nn.Identity()
        self.probes: list[Probe] = []

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | Lowered | None = None,
        position: Position | None = None,
        at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`.

        memory `[B, K, kv_dim]` makes it cross-attention; a cached one of fewer rows serves each
        an equal share of the tokens x `[B, 1, E]`. `at` `[B|1, T]` are the positions of
        x, None: those after what the cache holds. Outside a `Caches.begin`, a cache is begun and
        ended here. A `Lowered` mask is taken as it is; a `Mask`
        is placed over the cache first.
        """
        is_closed = cache is not None and not isinstance(cache, CrossCache) and not cache.is_open
        if at is None or is_closed:
            return self._alone(x, memory, mask, position, at, cache)
        if position is not None and position.rotates_late and cache is not None:
            # Queries and all the keys that are read must turn alike.
            position = position.prepare(at, cache.keys_at(at), x.dtype)
        if isinstance(cache, CrossCache) and cache.held is not None:
            q, (k, v) = self._queries(self.q(x)), cache.held
        else:
            q, k, v = self.projected(x, x if memory is None else memory)
            q, k, v = self._queries(q), self._keys(k), self._heads(v).transpose(1, 2)
        if position is not None:
            q = position.rotate(q, at)
        k, v, keys_at = self._remembered(k, v, memory is not None, position, at, cache)

        mask = Mask() if mask is None else mask
        if isinstance(mask, Mask):
            if cache is not None and not isinstance(cache, CrossCache):
                mask = cache.place(mask, at)
            mask = mask.lower(q.shape[2], k.shape[2], q.device)
        heads = self.weigh(q, k, v, mask, position, at, keys_at, cache)
        return self.out(heads.transpose(1, 2).flatten(2))

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
        """What the queries find, `[B, H, T, D]`: values by their weights."""
        for probe in self.probes:
            q, k, v = probe.projected(q, k, v)
        bias = None if position is None else position.bias(q, k, at, keys_at, self)
        needs_weights = any(probe.needs_weights for probe in self.probes)
        if needs_weights or (position is not None and position.has_values):
            drop = self.dropout if self.training else 0.0
            near = position, at, keys_at
            heads = attend_seen(q, k, v, mask, bias, self.scale, drop, self.probes, *near)
        else:
            heads = self._fused(q, k, v, mask, bias, cache)
        for probe in self.probes:
            heads = probe.heads(heads)
        return heads

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        bias: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        sharing = len(q) // len(k)
        if sharing > 1:
            # Rows that share a memory, as beams of one text do, are queries side by side.
            q = q.unflatten(0, (-1, sharing)).transpose(1, 2).flatten(2, 3)
        find = attend if cache is None else cache.attend
        heads = find(q, k, v, mask, bias, self.scale, self.dropout if self.training else 0.0)
        if sharing > 1:
            heads = heads.unflatten(2, (sharing, -1)).transpose(1, 2).flatten(0, 1)
        return heads

    def _alone(
        self,
        x: Tensor,
        memory: Tensor | None,
        mask: Mask | Lowered | None,
        position: Position | None,
        given: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """A call by itself: positions follow from the cache, which then advances."""
        if cache is None or isinstance(cache, CrossCache):
            at = torch.arange(x.shape[1], device=x.device)[None]
            return self(x, memory, mask, position, at, cache)
        caches = Caches([cache])
        expected = cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
        if given is not None and not torch.equal(given.expand_as(expected), expected):
            raise ValueError("positions do not go on from what the cache holds; leave out at")
        y = self(x, memory, mask, position, caches.begin(x.shape[1]), cache)
        caches.end()
        return y

    def _remembered(
        self,
        k: Tensor,
        v: Tensor,
        is_cross: bool,
        position: Position | None,
        at: Tensor,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values with those of before, and the keys' positions."""
        if isinstance(cache, CrossCache):
            k, v = cache.held or cache.keep(k, v)
            return k, v, torch.arange(k.shape[2], device=k.device)[None]
        keys_at = torch.arange(k.shape[2], device=k.device)[None] if is_cross else at
        late = position is not None and position.rotates_late
        if position is not None and not late:
            k = position.rotate(k, keys_at)
        if cache is not None:
            keys_at = cache.keys_at(at)
            k, v = cache.append(k, v, at)
        if position is not None and late:
            k = position.rotate(k, keys_at)
        return k, v, keys_at

    def projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        """Queries of x `[B, T, H D]`, keys and values of a source `[B, K, G D]`."""
        return self.q(x), self.k(source), self.v(source)

    def _queries(self, q: Tensor) -> Tensor:
        return self.q_norm(self._heads(q)).transpose(1, 2)

    def _keys(self, k: Tensor) -> Tensor:
        return self.k_norm(self._heads(k)).transpose(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)
