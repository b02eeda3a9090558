"""Attention weights small enough for a page: a byte for each, those near zero left out.

L layers, H heads, Q queries, K keys.
"""

import gzip
from base64 import b64encode
from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.errors import ConfigError

MOST_BYTES = 2**27  # of a page's weights, unpacked; a browser holds them
_BUDGET = 1_050_000  # bytes of all stacks together as gzip; base64 makes a third more of it
_LEAST = (0, 2, 4, 8, 12, 18, 26, 36, 50, 70, 100, 140, 200)  # bytes under which weights go


def bytes_of(weights: Tensor) -> Tensor:
    """Shares as bytes of the same shape: the root of a share, so that small ones are told apart."""
    return (weights.float().clamp(0, 1).sqrt_().mul_(255)).round_().to(torch.uint8).cpu()


def share_of(byte: int) -> float:
    """What a byte stands for."""
    return (byte / 255) ** 2


def packed(stacks: Sequence[Tensor]) -> tuple[list[str], float]:
    """Each stack's bytes as gzip and base64, and the share under which they were left out.

    As few are left out as the page's size asks. ConfigError for more than a browser holds, and
    where nothing left out would be enough.
    """
    size = sum(stack.numel() for stack in stacks)
    if size > MOST_BYTES:
        raise ConfigError(
            f"a page holds {MOST_BYTES:,} weights and these are {size:,}: give a shorter text, or "
            "name fewer layers"
        )
    low, high, best = 0, len(_LEAST), None
    while low < high:
        middle = (low + high) // 2 if best or low else 0
        texts = [_zipped(stack, _LEAST[middle]) for stack in stacks]
        if sum(map(len, texts)) <= _BUDGET:
            best, high = (texts, _LEAST[middle]), middle
        else:
            low = middle + 1
    if best is None:
        raise ConfigError(
            f"{size:,} weights do not fit a page of 2 MB: give a shorter text, or name fewer layers"
        )
    return [b64encode(text).decode("ascii") for text in best[0]], share_of(best[1])


def _zipped(stack: Tensor, least: int) -> bytes:
    kept = stack if least == 0 else stack * (stack >= least)
    return gzip.compress(kept.contiguous().numpy().tobytes(), 6, mtime=0)
