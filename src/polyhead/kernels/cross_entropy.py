"""Cross-entropy by a kernel of our own: logits become their gradient where they stand, in two
passes where torch takes eight, half of them in float32."""

import ctypes

import torch
from torch import Tensor

from polyhead.kernels.native import TYPES, address, library, takes


def cross_entropy_(
    logits: Tensor, labels: Tensor, smoothing: float, differentiates: bool
) -> tuple[Tensor, Tensor] | None:
    """The summed losses of logits `[N, V]` for labels `[N]` (below 0: does not count) and for all
    classes alike; None where the kernel does not take them.

    differentiates: the logits become the gradient of `(1 - smoothing)` times the one plus
    `smoothing` times the other.
    """
    fits = logits.is_contiguous() and labels.dtype == torch.int64 and labels.device.type == "cpu"
    kernel = library("cross_entropy") if fits and takes(logits) else None
    # A label that is no class would be looked up outside the row; torch says so.
    if kernel is None or bool((labels >= logits.shape[1]).any()):
        return None
    labels = labels.contiguous()
    rows, width = logits.shape
    sums = logits.new_empty(2, rows, dtype=torch.float32)
    getattr(kernel, f"cross_entropy_{TYPES[logits.dtype]}")(
        address(logits), address(labels), address(sums[0]), address(sums[1]),
        ctypes.c_int64(rows), ctypes.c_int64(width), ctypes.c_float(smoothing),
        ctypes.c_int32(differentiates), ctypes.c_int32(torch.get_num_threads()),
    )  # fmt: skip
    nll, even = sums.sum(1)
    return nll, even
