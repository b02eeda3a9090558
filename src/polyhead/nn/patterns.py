"""Sparse patterns, each a `Mask` over positions."""

import torch
from torch import Tensor

from polyhead.nn.mask import Mask


def strided(stride: int) -> Mask:
    """The last `stride` positions and every `stride`-th one (Child et al. 2019, section 4.2)."""
    if stride < 1:
        raise ValueError(f"stride is {stride}; use 1 or more")

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((q - k).abs() < stride) | ((q - k) % stride == 0)

    return Mask(allow=(allowed,))


def prefix(lengths: Tensor) -> Mask:
    """Causal, but the first `lengths[b]` positions are seen by all (prefix-LM)."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < lengths[b])

    return Mask(allow=(allowed,), rows=len(lengths))


def big_bird(window: int, num_global: int, num_random: int, max_len: int, seed: int = 0) -> Mask:
    """Local, global and random keys (Zaheer et al. 2020), position by position, not in blocks.

    The first `num_global` positions see all and are seen by all; each query further sees
    positions less than `window` away and `num_random` fixed ones drawn from `seed`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(max_len, (max_len, num_random), generator=generator, device="cpu")

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        local = (q - k).abs() < window
        everywhere = (q < num_global) | (k < num_global)
        chosen = drawn.to(q.device)[q.clamp(0, max_len - 1)]
        return local | everywhere | (chosen == k.unsqueeze(-1)).any(-1)

    return Mask(allow=(allowed,))


def shifted_windows(height: int, width: int, window: int, shift: int) -> Mask:
    """Regions of an image rolled by `shift` that lie in one window (Liu et al. 2021, figure 4).

    The tokens are the windows' own, in order: `[windows, window * window]` segments.
    """
    regions = torch.zeros(height, width, dtype=torch.long)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in edges for c in edges):
        regions[rows, columns] = number
    windows = regions.view(height // window, window, width // window, window).transpose(1, 2)
    return Mask(segments=windows.reshape(-1, window * window))
