"""Weights in few bits: what is kept of a matrix `[R, W]`, and how it is unpacked."""

from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError

Rows = slice | Tensor
"""Which rows: a stretch, or their numbers `[n]`."""
_ALL = slice(None)
STEPS = 32  # weights of a group with steps of its own
HALF_MOST = 65504.0  # the largest float16
BLOCK, GROUP = 64, 256  # weights of a scale, scales of a step (Dettmers et al. 2023, section 3)
_AT_ONCE = 1 << 18  # weights that are unpacked at a time, so that they stay in a cache


class PackedWeight(nn.Module):
    """A matrix in few bits. `dtype`: what it unpacks to, which follows `Module.to`."""

    name: ClassVar[str]
    learning: tuple[Tensor, ...] = ()  # parts that products give gradients of

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

    @property
    def form(self) -> str:
        """What `form_named` knows it by."""
        return self.name

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


class Stepped(PackedWeight):
    """Codes in even steps: whole numbers, and for each group of a row what they stand for.

    group: weights that share their steps, 32 or a multiple of it that divides W; each row has
    groups of its own, of 32 the last may be short. steps: those to round by, `[R, groups]` each,
    float16; None is all of each group, from its least weight to its largest.
    """

    codes: Tensor  # [R, runs, ...]: of each 32 weights of a row
    scales: Tensor  # [R, groups]

    def __init__(
        self, weight: Tensor, group: int = STEPS, steps: tuple[Tensor, ...] | None = None
    ) -> None:
        super().__init__(weight)
        groups = self.grouped(weight.detach().float(), group)
        steps = self.widest(groups) if steps is None else steps
        codes = self.nearest(groups, *(part.float()[..., None] for part in steps))
        self._hold_codes(codes.flatten(1).unflatten(1, (-1, STEPS)))
        for name, part in zip(self.step_names, steps, strict=True):
            self._hold(name, part)

    step_names: tuple[str, ...] = ("scales",)

    @classmethod
    def grouped(cls, weight: Tensor, group: int) -> Tensor:
        """A matrix `[R, W]` by its groups `[R, groups, group]`, the last filled up."""
        short = -weight.shape[1] % group
        filled = F.pad(weight[:, None], (0, short), mode="replicate")[:, 0] if short else weight
        return filled.unflatten(1, (-1, group))

    @classmethod
    def widest(cls, groups: Tensor) -> tuple[Tensor, ...]:
        """Steps, in float16, over all of each group `[..., n]`."""
        raise NotImplementedError

    @classmethod
    def nearest(cls, weights: Tensor, *steps: Tensor) -> Tensor:
        """The codes nearest to weights, as floats; steps `[..., 1]` or as many as weights."""
        raise NotImplementedError

    @classmethod
    def values(cls, codes: Tensor, *steps: Tensor) -> Tensor:
        """What codes stand for."""
        raise NotImplementedError

    @classmethod
    def fit(cls, codes: Tensor, weights: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        """The steps, in float16, by which codes `[..., n]` come nearest to weights, squares weighed
        by importance."""
        raise NotImplementedError

    @classmethod
    def middle(cls, groups: Tensor) -> Tensor | float:
        """What stays where a group is drawn together."""
        return 0.0

    def _hold_codes(self, codes: Tensor) -> None:
        self._hold("codes", codes.to(torch.int8))

    def _codes(self, rows: Rows) -> Tensor:
        return self.codes[rows]

    @property
    def group(self) -> int:
        """Weights that share their steps."""
        return STEPS * (self.codes.shape[1] // self.scales.shape[1])

    @property
    def form(self) -> str:
        return self.name if self.group == STEPS else f"{self.name}-{self.group}"

    def steps(self, rows: Rows = _ALL) -> tuple[Tensor, ...]:
        """The steps of each 32 weights, float16 `[n, runs]` each."""
        parts = (getattr(self, name)[rows] for name in self.step_names)
        times = self.group // STEPS
        return tuple(part if times == 1 else part.repeat_interleave(times, 1) for part in parts)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        steps = (part.float()[..., None] for part in self.steps(rows))
        found = self.values(self._codes(rows), *steps)
        return found.flatten(1)[:, : self.shape[1]].to(self.dtype)


class Int8(Stepped):
    """Eight bits a weight and a scale in float16 for 32, as in GGUF's Q8_0: 1.063 bytes."""

    name = "int8"

    @classmethod
    def widest(cls, groups: Tensor) -> tuple[Tensor, ...]:
        return ((groups.abs().amax(-1) / 127).clamp(max=HALF_MOST).half(),)

    @classmethod
    def nearest(cls, weights: Tensor, *steps: Tensor) -> Tensor:
        return (weights / steps[0].clamp_min(1e-30)).round_().clamp_(-127, 127)

    @classmethod
    def values(cls, codes: Tensor, *steps: Tensor) -> Tensor:
        return codes * steps[0]

    @classmethod
    def fit(cls, codes: Tensor, weights: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        square = (importance * codes * codes).sum(-1)
        scales = (importance * codes * weights).sum(-1) / square.clamp_min(1e-30)
        return (scales.clamp(0, HALF_MOST).half(),)


class Int8Rows(PackedWeight):
    """A byte a weight and a scale a row, from its largest weight."""

    name = "int8-rows"
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


class Int4(Stepped):
    """Four bits a weight, in even steps from the least to the largest of 32: 0.625 bytes.

    What a code stands for is `scale * code + least`, both in float16, as in GGUF's Q4_1. `codes`
    hold the first half of 32 in the low bits, the other above.
    """

    name = "int4"
    step_names = ("scales", "least")
    least: Tensor  # [R, groups]

    @classmethod
    def widest(cls, groups: Tensor) -> tuple[Tensor, ...]:
        least = groups.amin(-1).clamp(-HALF_MOST, HALF_MOST).half()
        return ((groups.amax(-1) - least.float()) / 15).clamp(max=HALF_MOST).half(), least

    @classmethod
    def nearest(cls, weights: Tensor, *steps: Tensor) -> Tensor:
        scales, least = steps
        return ((weights - least) / scales.clamp_min(1e-30)).round_().clamp_(0, 15)

    @classmethod
    def values(cls, codes: Tensor, *steps: Tensor) -> Tensor:
        return torch.addcmul(steps[1], codes, steps[0])

    @classmethod
    def fit(cls, codes: Tensor, weights: Tensor, importance: Tensor) -> tuple[Tensor, ...]:
        share = importance / importance.sum(-1, keepdim=True)
        code, weight = (share * codes).sum(-1), (share * weights).sum(-1)
        off, away = codes - code[..., None], weights - weight[..., None]
        scales = (share * off * away).sum(-1) / (share * off * off).sum(-1).clamp_min(1e-30)
        scales = scales.clamp(0, HALF_MOST).half()
        return scales, (weight - scales.float() * code).clamp(-HALF_MOST, HALF_MOST).half()

    @classmethod
    def middle(cls, groups: Tensor) -> Tensor | float:
        return (groups.amin(-1, keepdim=True) + groups.amax(-1, keepdim=True)) / 2

    def _hold_codes(self, codes: Tensor) -> None:
        low, high = codes.to(torch.uint8).unflatten(2, (2, -1)).unbind(2)
        self._hold("codes", high << 4 | low)

    def _codes(self, rows: Rows) -> Tensor:
        return torch.cat([self.codes[rows] & 15, self.codes[rows] >> 4], 2)


class Half(PackedWeight):
    """Sixteen bits a weight: float16, which holds eleven bits of each up to 65504."""

    name = "fp16"
    kind = torch.float16
    halves: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._hold("halves", weight.detach().clamp(*_ends(self.kind)).to(self.kind))

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        return self.halves[rows].to(self.dtype)


class BrainHalf(Half):
    """The same in bfloat16: eight bits of each weight, of any size."""

    name = "bf16"
    kind = torch.bfloat16


class Nf4(PackedWeight):
    """Four bits a weight, a byte a scale of 64 of them, a step for 256 scales: 0.516 bytes.

    NormalFloat and double quantisation as in QLoRA (Dettmers et al. 2023, section 3); weights are
    rounded by the scales that are kept. Each row has blocks of its own.
    """

    name = "nf4"
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

    name = "nf6"
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
    form.name: form for form in (Nf4, Nf6, Int4, Int8, Int8Rows, Half, BrainHalf)
}
GROUPS = (32, 64, 128)
"""How many weights may share their steps in `Stepped` forms."""


def form_named(name: str) -> Callable[[Tensor], PackedWeight]:
    """What packs a matrix into a form: "nf4", "int8", "int4-64" (steps for 64).

    Errors: ConfigError for one that is not known.
    """
    base, _, group = name.rpartition("-")
    if name in FORMATS:
        return FORMATS[name]
    form = FORMATS.get(base)
    if form is None or not issubclass(form, Stepped) or group not in map(str, GROUPS):
        raise ConfigError(f"form is {name!r}: choose one of {', '.join(FORMATS)}")
    return partial(form, group=int(group))


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype)
    return info.min, info.max


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
