"""Floats as GGUF's blocks of 32, as ggml's reference packs them (ggml-quants.c)."""

from collections.abc import Callable

import torch
from torch import Tensor

from polyhead.files.gguf_blocks import BY_NAME, CHUNK
from polyhead.files.gguf_types import RawTensor


def _q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    return torch.cat(
        [_half(scale), _rounded(x * _inverse(scale)).to(torch.int8).view(torch.uint8)], 1
    )


def _q4_0(x: Tensor) -> Tensor:
    # The largest, with its sign, becomes -8.
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = largest / -8
    return torch.cat([_half(scale), _nibbles(x * _inverse(scale) + 8.5)], 1)


def _q4_1(x: Tensor) -> Tensor:
    least = x.amin(1, keepdim=True)
    scale = (x.amax(1, keepdim=True) - least) / 15
    return torch.cat([_half(scale), _half(least), _nibbles((x - least) * _inverse(scale) + 0.5)], 1)


def _half(x: Tensor) -> Tensor:
    return x.half().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _rounded(x: Tensor) -> Tensor:
    """Halves away from zero, as C rounds."""
    whole = x.abs().floor()
    return x.sign() * (whole + (2 * (x.abs() - whole)).floor())


def _nibbles(x: Tensor) -> Tensor:
    """[blocks, 32] to 16 bytes: the first half in the low bits."""
    low, high = x.to(torch.int8).clamp(0, 15).to(torch.uint8).chunk(2, 1)
    return low | high << 4


PACKERS: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


def pack(tensor: Tensor, kind: str) -> RawTensor:
    """A tensor whose last size is a multiple of 32 in blocks of `kind`, one of PACKERS."""
    row = BY_NAME[kind]
    blocks = tensor.reshape(-1, row.weights)
    data = torch.empty(len(blocks), row.size, dtype=torch.uint8)
    step = max(1, CHUNK // row.weights)
    for part, out in zip(blocks.split(step), data.split(step), strict=True):
        out.copy_(PACKERS[kind](part.float()))
    return RawTensor(kind, tuple(tensor.shape), data.flatten())
