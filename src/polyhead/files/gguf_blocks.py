"""GGUF's tensor types: the size of their blocks, and the arithmetic that turns blocks into numbers.

A row of a quantised tensor is a run of blocks of 32 or 256 weights (K types), each with its own
scales. Layouts: llama.cpp, ggml-common.h. The order of operations is that of gguf.quants, so that
results agree bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights dequantised at a time: they stay in a core's cache, and no step is large enough for torch
# to share it among threads, which on a busy machine wait for each other ten times longer than the
# work takes.
CHUNK = 1 << 15


@dataclass(frozen=True)
class BlockType:
    """A row of ggml's type table: `size` bytes hold `weights` values."""

    name: str
    code: int
    weights: int
    size: int
    dtype: torch.dtype | None = None  # of plain, unquantised values


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, as fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _affine(q: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """out = q * scale (+ shift), rounded after each step as the reference does."""
    out.copy_(q)
    out.mul_(scale)
    if shift is not None:
        out.add_(shift)


def _nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2n] values: all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bits(packed: Tensor) -> Tensor:
    """[blocks, 4] bytes to [blocks, 32] values 0 or 16: bit i of the word, as bit 4."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 1).reshape(len(packed), 32) << 4


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _affine(_nibbles(blocks[:, 2:18]).view(torch.int8) - 8, _half(blocks, 0), None, out)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _affine(_nibbles(blocks[:, 4:20]), _half(blocks, 0), _half(blocks, 2), out)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, 6:22]) | _bits(blocks[:, 2:6])
    _affine(q.view(torch.int8) - 16, _half(blocks, 0), None, out)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, 8:24]) | _bits(blocks[:, 4:8])
    _affine(q, _half(blocks, 0), _half(blocks, 2), out)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    _affine(blocks[:, 2:34].view(torch.int8), _half(blocks, 0), None, out)


def _scale_min(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the 8 groups of a Q4_K or Q5_K block, each fp32 [blocks, 8, 1].

    12 bytes from byte 4 hold 16 numbers of 6 bits: four whole ones of each kind with two bits above
    them, which belong to the last four, whose low nibbles share the last four bytes.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=-1)
    minimum = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 48)], dim=-1)
    scales = (_half(blocks, 0) * scale.float())[:, :, None]
    minima = (_half(blocks, 2) * minimum.float())[:, :, None]
    return scales, minima


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scale, minimum = _scale_min(blocks)
    q = _nibbles(blocks[:, 16:144].unflatten(1, (4, 32)))
    _affine(q.reshape(-1, 8, 32), scale, -minimum, out.view(-1, 8, 32))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scale, minimum = _scale_min(blocks)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1) << 4
    q = _nibbles(blocks[:, 48:176].unflatten(1, (4, 32))).reshape(-1, 8, 32) | fifth
    _affine(q, scale, -minimum, out.view(-1, 8, 32))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = ((blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3) << 4
    q = _nibbles(blocks[:, 0:128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32) | high
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    _affine(
        q.reshape(-1, 16, 16).view(torch.int8) - 32, scale[:, :, None], None, out.view(-1, 16, 16)
    )


TYPES = {
    row.code: row
    for row in (
        BlockType("F32", 0, 1, 4, torch.float32),
        BlockType("F16", 1, 1, 2, torch.float16),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q8_1", 9, 32, 40),
        BlockType("Q2_K", 10, 256, 84),
        BlockType("Q3_K", 11, 256, 110),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("Q8_K", 15, 256, 292),
        BlockType("IQ2_XXS", 16, 256, 66),
        BlockType("IQ2_XS", 17, 256, 74),
        BlockType("IQ3_XXS", 18, 256, 98),
        BlockType("IQ1_S", 19, 256, 50),
        BlockType("IQ4_NL", 20, 32, 18),
        BlockType("IQ3_S", 21, 256, 110),
        BlockType("IQ2_S", 22, 256, 82),
        BlockType("IQ4_XS", 23, 256, 136),
        BlockType("I8", 24, 1, 1, torch.int8),
        BlockType("I16", 25, 1, 2, torch.int16),
        BlockType("I32", 26, 1, 4, torch.int32),
        BlockType("I64", 27, 1, 8, torch.int64),
        BlockType("F64", 28, 1, 8, torch.float64),
        BlockType("IQ1_M", 29, 256, 56),
        BlockType("BF16", 30, 1, 2, torch.bfloat16),
        BlockType("TQ1_0", 34, 256, 54),
        BlockType("TQ2_0", 35, 256, 66),
        BlockType("MXFP4", 39, 32, 17),
        BlockType("NVFP4", 40, 64, 36),
        BlockType("Q1_0", 41, 128, 18),
    )
}
BY_NAME = {row.name: row for row in TYPES.values()}

DEQUANTIZERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def can_dequantize(kind: BlockType) -> bool:
    """Whether `dequantize` knows this type."""
    return kind.dtype is not None or kind.name in DEQUANTIZERS


def dequantize(data: Tensor, kind: BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks uint8 [bytes] of a quantised type to values [weights] in `dtype`, computed in fp32."""
    decode = DEQUANTIZERS[kind.name]
    blocks = data.view(-1, kind.size)
    device = blocks.device
    out = torch.empty(len(blocks), kind.weights, dtype=dtype, device=device)
    step = max(1, CHUNK // kind.weights if device.type == "cpu" else len(blocks))
    is_direct = dtype == torch.float32
    scratch = None if is_direct else torch.empty(step, kind.weights, device=device)
    for start in range(0, len(blocks), step):
        part = blocks[start : start + step]
        target = out[start : start + step]
        if scratch is None:
            decode(part, target)
        else:
            values = scratch[: len(part)]
            decode(part, values)
            target.copy_(values)
    return out.view(-1)
