"""What every decoder's backbone does around its layers: positions, masks and caches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyhead.nn.cache import Cache, Caches, GrowingCache, StaticCache
from polyhead.nn.mask import Lowered, Mask, as_mask
from polyhead.nn.position import Position
from polyhead.nn.rolling import RollingCache

CAUSAL = Mask(causal=True)


@dataclass(frozen=True)
class Placed:
    """New tokens among what is already held: their positions, and each layer's mask and cache."""

    at: Tensor  # [B|1, T]
    masks: Sequence[Lowered]  # one a layer
    positions: Sequence[Position | None]  # one a layer
    caches: Sequence[Cache | None]  # one a layer


def place(
    input_ids: Tensor,
    attention_mask: Tensor | Mask | None,
    position_ids: Tensor | None,
    caches: Caches | None,
    windows: Sequence[int | None],
    position: Position | None,
    dtype: torch.dtype,
    base: Mask = CAUSAL,
) -> Placed:
    """Lower masks and prepare positions once a forward, for every kind of layer there is.

    windows: each layer's, None where it sees all. base: what every layer's mask is. Without a
    cache, positions count the tokens that are not padding; with one, they go on from what each
    row holds.
    """
    num_tokens, device = input_ids.shape[1], input_ids.device
    given = as_mask(attention_mask, input_ids.shape[:2])
    if caches is None:
        at = position_ids if position_ids is not None else _count(given, num_tokens, device)
    else:
        at = advance(input_ids, given, position_ids, caches)
        # The padding is not kept, so no query meets it again.
        given = replace(given, keep=None)

    masks: dict[object, Lowered] = {}
    positions: dict[object, Position | None] = {}
    kinds: list[object] = []
    for layer, window in enumerate(windows):
        cache = caches[layer] if caches is not None else None
        kind = (window, type(cache))
        kinds.append(kind)
        if kind in masks:
            continue
        mask = given & base & Mask(window=window)
        keys_at = at
        if cache is not None:
            mask, keys_at = cache.place(mask, at), cache.keys_at(at)
        masks[kind] = mask.lower(num_tokens, keys_at.shape[1], device)
        positions[kind] = None if position is None else position.prepare(at, keys_at, dtype)
    return Placed(
        at,
        [masks[kind] for kind in kinds],
        [positions[kind] for kind in kinds],
        list(caches) if caches is not None else [None] * len(kinds),
    )


def advance(input_ids: Tensor, given: Mask, position_ids: Tensor | None, caches: Caches) -> Tensor:
    """Begin a step of the caches; the positions `[B, T]` of its tokens. ValueError where they do
    not belong together."""
    if position_ids is not None:
        raise ValueError("with a cache, positions follow from what it holds: pass no ids")
    if given.segments is not None:
        raise ValueError("a cache holds one text a row: segments need a forward without one")
    if len(caches.lengths) != len(input_ids):
        raise ValueError(
            f"caches of {len(caches.lengths)} rows do not serve {len(input_ids)} rows of tokens"
        )
    return caches.begin(input_ids.shape[1], given.keep)


def _count(mask: Mask, num_tokens: int, device: torch.device) -> Tensor:
    if mask.keep is None:
        return torch.arange(num_tokens, device=device)[None]
    return (mask.keep.long().cumsum(1) - 1).clamp(min=0)


def make_caches(
    batch_size: int,
    max_len: int | None,
    windows: Sequence[int | None],
    num_kv_heads: int,
    head_dim: int,
    like: Tensor,
) -> Caches:
    """A cache for each layer: rolling where it has a window, else static, or growing.

    max_len: positions of the static buffers; None: growing. like: gives dtype and device.
    """

    def one(window: int | None) -> Cache:
        if window is not None and (max_len is None or window < max_len):
            return RollingCache(batch_size, num_kv_heads, head_dim, window, like)
        if max_len is not None:
            return StaticCache(batch_size, num_kv_heads, head_dim, max_len, like)
        return GrowingCache(batch_size, num_kv_heads, head_dim, like)

    return Caches([one(window) for window in windows])
