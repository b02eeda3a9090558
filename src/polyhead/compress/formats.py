"""Weights in few bits: what is kept of a matrix `[R, W]`, and how it is unpacked."""

from collections.abc import Callable
from functools import cache
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = slice | Tensor
"""Which rows: a stretch, or their numbers `[n]`."""
_ALL = slice(None)
STEPS = 32  # weights of a group with steps of its own
_HALF = 65504.0  # the largest float16
BLOCK, GROUP = 64, 256  # weights of a scale, scales of a step (Dettmers et al. 2023, section 3)
_AT_ONCE = 1 << 18  # weights that are unpacked at a time, so that they stay in a cache


class PackedWeight(nn.Module):
    """A matrix in few bits. `dtype`: what it unpacks to, which follows `Module.to`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.num_weights = weight.numel()

    @classmethod
    def holding(cls, like: Tensor, **parts: Tensor) -> Self:
        """One of ready parts by their names; of `like` it has shape and dtype alone."""
        found = cls.__new__(cls)
        PackedWeight.__init__(found, like)
        for name, part in parts.items():
            found._hold(name, part)
        return found

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        """The matrix, or some rows of it, in `dtype`."""
        raise NotImplementedError

    def times(self, x: Tensor, rows: slice = _ALL) -> Tensor | None:
        """x `[..., W]` by some rows, `[..., n]`; None where it must be unpacked for that."""
        return None

    def _hold(self, name: str, part: Tensor) -> None:
        # The layer's state is the weight that it unpacks to.
        self.register_buffer(name, part, persistent=False)

    def num_bytes(self) -> int:
        """What it takes in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Scales keep their type: in fewer bits they would change every weight.
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class Int8(PackedWeight):
    """Eight bits a weight and a scale in float16 for 32, as in GGUF's Q8_0: 1.063 bytes.

    Each row has groups of its own, the last of which may be short.
    """

    codes: Tensor  # [R, groups, 32]
    scales: Tensor  # [R, groups]

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        groups = F.pad(weight.detach().float(), (0, -weight.shape[1] % STEPS))
        groups = groups.unflatten(1, (-1, STEPS))
        scales = (groups.abs().amax(2) / 127).clamp(max=_HALF).half()
        shares = groups / scales.float().clamp_min(1e-30)[..., None]
        self._hold("codes", shares.round_().clamp_(-127, 127).to(torch.int8))
        self._hold("scales", scales)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        found = self.codes[rows] * self.scales[rows].float()[..., None]
        return found.flatten(1)[:, : self.shape[1]].to(self.dtype)


class Int8Rows(PackedWeight):
    """A byte a weight and a scale a row, from its largest weight."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        weight = weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self._hold("codes", (weight / scale.clamp_min(1e-30)).round_().to(torch.int8))
        self._hold("scale", scale)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        return (self.codes[rows] * self.scale[rows]).to(self.dtype)


class Int4(PackedWeight):
    """Four bits a weight, in even steps from the least to the largest of 32: 0.625 bytes.

    What a code stands for is `scale * code + least`, both in float16, as in GGUF's Q4_1. Each row
    has groups of its own, the last of which may be short.
    """

    codes: Tensor  # [R, groups, 16]: the first half of a group in the low bits, the other above
    scales: Tensor  # [R, groups]
    least: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        weight = weight.detach().float()
        short = -weight.shape[1] % STEPS
        groups = F.pad(weight[:, None], (0, short), mode="replicate").view(len(weight), -1, STEPS)
        least = groups.amin(2).clamp(-_HALF, _HALF).half()
        scales = ((groups.amax(2) - least.float()) / 15).clamp(max=_HALF).half()
        above = groups - least.float()[..., None]
        codes = (above / scales.float().clamp_min(1e-30)[..., None]).round_().clamp_(0, 15)
        low, high = codes.to(torch.uint8).unflatten(2, (2, -1)).unbind(2)
        self._hold("codes", high << 4 | low)
        self._hold("scales", scales)
        self._hold("least", least)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        codes = torch.cat([self.codes[rows] & 15, self.codes[rows] >> 4], 2)
        found = torch.addcmul(
            self.least[rows].float()[..., None], codes, self.scales[rows].float()[..., None]
        )
        return found.flatten(1)[:, : self.shape[1]].to(self.dtype)


class Nf4(PackedWeight):
    """Four bits a weight, a byte a scale of 64 of them, a step for 256 scales: 0.516 bytes.

    NormalFloat and double quantisation as in QLoRA (Dettmers et al. 2023, section 3); weights are
    rounded by the scales that are kept. Each row has blocks of its own.
    """

    bits = 4
    codes: Tensor
    scales: Tensor
    steps: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        weight = weight.detach().float()
        blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        mean = largest.mean()
        off = F.pad((largest - mean).flatten(), (0, -largest.numel() % GROUP)).view(-1, GROUP)
        steps = off.abs().amax(1) / 127
        scales = (off / steps.clamp_min(1e-30)[:, None]).round_().to(torch.int8)
        self._hold("scales", scales.flatten()[: largest.numel()].view_as(largest))
        self._hold("steps", steps)
        self._hold("mean", mean)
        levels = normal_float(self.bits).to(weight.device)
        shares = blocks / self._largest(_ALL).clamp_min(1e-30)[..., None]
        nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        self._keep(nearest.flatten(1).to(torch.uint8))

    def _keep(self, codes: Tensor) -> None:
        """Two codes `[R, W]` a byte."""
        high, low = codes.unflatten(1, (-1, 2)).unbind(-1)
        self._hold("codes", high << 4 | low)

    def _levels(self, rows: slice | Tensor) -> Tensor:
        """The level of each weight of the rows, in float32, `[n, W]`."""
        codes = self.codes[rows]
        pairs = _pairs(codes.device).index_select(0, codes.flatten().int())
        return pairs.view(torch.float32).view(len(codes), -1)

    def _largest(self, rows: Rows) -> Tensor:
        """The scale of each block of the rows `[n, blocks]`."""
        count, blocks = self.scales.shape
        places = torch.arange(count * blocks, device=self.scales.device).view(count, blocks)
        return torch.addcmul(self.mean, self.scales[rows], self.steps[places[rows] // GROUP])

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        largest, width = self._largest(rows), self.shape[1]
        found = torch.empty(len(largest), width, dtype=self.dtype, device=largest.device)
        numbers = torch.arange(self.shape[0], device=largest.device)[rows]
        some = max(1, _AT_ONCE // width)
        for out, part, scale in zip(
            found.split(some), numbers.split(some), largest.split(some), strict=True
        ):
            # A stretch is a view, which numbers are not.
            part = slice(int(part[0]), int(part[-1]) + 1) if isinstance(rows, slice) else part
            levels = self._levels(part)
            levels.unflatten(1, (-1, BLOCK)).mul_(scale[..., None])
            out.copy_(levels[:, :width])
        return found


class Nf6(Nf4):
    """The same with 64 levels: 0.766 bytes a weight, for what bears four bits ill."""

    bits = 6
    finer: Tensor

    def _keep(self, codes: Tensor) -> None:
        super()._keep(codes >> 2)
        a, b, c, d = (codes & 3).unflatten(1, (-1, 4)).unbind(-1)
        self._hold("finer", a << 6 | b << 4 | c << 2 | d)

    def _levels(self, rows: slice | Tensor) -> Tensor:
        codes, finer = self.codes[rows], self.finer[rows]
        coarse = torch.stack([codes >> 4, codes & 15], -1).flatten(1)
        fine = torch.stack([finer >> 6, finer >> 4 & 3, finer >> 2 & 3, finer & 3], -1).flatten(1)
        index = (coarse << 2 | fine).flatten().int()
        levels = normal_float(6).to(codes.device)
        return levels.index_select(0, index).view_as(coarse)


FORMATS: dict[str, type[PackedWeight]] = {
    "nf4": Nf4,
    "nf6": Nf6,
    "int4": Int4,
    "int8": Int8,
    "int8-rows": Int8Rows,
}


@cache
def normal_float(bits: int = 4) -> Tensor:
    """The levels `[2^bits]`: quantiles of a normal distribution, from -1 to 1, with a zero."""
    half = 2 ** (bits - 1)
    # Of the outermost quantile: halfway between what suits either side (QLoRA, section 3).
    edge = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(edge, 0.5, count, dtype=torch.float64)[:-1])
        for count in (half + 1, half)
    )
    levels = torch.cat([above, -below, above.new_zeros(1)]).sort().values
    return (levels / levels.max()).float()


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of every byte `[256]`, as one number of 64 bits."""
    levels = normal_float()
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    return both.contiguous().view(torch.float64).squeeze(1).to(device)
