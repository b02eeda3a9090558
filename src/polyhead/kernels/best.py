"""The likeliest tokens of rows of logits by a kernel of our own: one that writes no row of all
log-probabilities, and sorts none."""

import ctypes

import torch
from torch import Tensor

from polyhead.kernels.native import address, library, takes


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities `[N, count]` of the likeliest tokens of logits `[N, V]`, and those.

    The largest first; `count` of V at most, and no logits that are not numbers.
    """
    fits = logits.is_contiguous() and logits.dtype == torch.float32 and takes(logits)
    kernel = library("best") if fits else None
    if kernel is None:
        found = logits.float().log_softmax(1).topk(count, dim=1)
        return found.values, found.indices
    rows, width = logits.shape
    values = logits.new_empty(rows, count)
    tokens = logits.new_empty(rows, count, dtype=torch.long)
    kernel.best_float32(
        address(logits), address(values), address(tokens), ctypes.c_int64(rows),
        ctypes.c_int64(width), ctypes.c_int64(count), ctypes.c_int32(torch.get_num_threads()),
    )  # fmt: skip
    return values, tokens
