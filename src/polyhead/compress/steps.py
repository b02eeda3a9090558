"""Steps of a group of weights, chosen for the least error instead of the widest reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.compress.formats import STEPS, Int8, PackedWeight, Stepped

Rounded = tuple[Tensor, tuple[Tensor, ...]]
"""Weights `[R, W]` that lie on a grid, and its steps."""
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)  # of a group's reach


def fitted(
    form: type[Stepped], weight: Tensor, group: int, importance: Tensor
) -> tuple[Tensor, ...]:
    """Steps `[R, groups]` for a matrix `[R, W]`, of which columns matter by `importance` `[W]`.

    For a few reaches, each cut at both ends, the codes are fitted by least squares; the best of
    them stands, and the widest reach where none is better: what lies on a grid already stays.
    """
    groups = form.grouped(weight, group)
    heft = form.grouped(importance[None].clamp_min(0), group)
    heft = heft + heft.mean(-1, keepdim=True) * 1e-3 + 1e-30
    best = form.widest(groups)
    least = _error(form, groups, heft, best)
    middle = form.middle(groups)
    for share in _SHARES:
        tried = form.widest(middle + (groups - middle) * share)
        codes = form.nearest(groups, *_wide(tried))
        steps = form.fit(codes, groups, heft)
        error = _error(form, groups, heft, steps)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(steps, best, strict=True))
    return best


def _error(form: type[Stepped], groups: Tensor, heft: Tensor, steps: tuple[Tensor, ...]) -> Tensor:
    """The weighted square of what rounding takes from each group."""
    wide = _wide(steps)
    lost = form.values(form.nearest(groups, *wide), *wide).sub_(groups)
    return lost.square_().mul_(heft).sum(-1)


def _wide(steps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.float()[..., None] for part in steps)


@dataclass(frozen=True)
class Grid:
    """What matrices are rounded to: a form, and how many weights share its steps."""

    form: type[Stepped]
    group: int

    def nearest(self, weight: Tensor, importance: Tensor) -> Rounded:
        """A matrix `[R, W]` rounded by the steps that suit its columns' importance `[W]`."""
        weight = weight.detach().float()
        return weight, fitted(self.form, weight, self.group, importance)

    def pack(self, parts: Sequence[Rounded], dtype: torch.dtype) -> Stepped:
        """One matrix in few bits of several, one below the other."""
        steps = zip(*(steps for _, steps in parts), strict=True)
        values = torch.cat([values for values, _ in parts])
        found = self.form(values, self.group, tuple(torch.cat(part) for part in steps))
        found.dtype = dtype
        return found


def rounded_inputs(x: Tensor, form: type[PackedWeight]) -> Tensor:
    """Activations `[..., W]` as `pack`'s products round them, in float32: the definition.

    form: of the weights that they meet; `Int8` is worth a scale for each 16.
    """
    some = STEPS // 2 if form is Int8 else STEPS
    groups = F.pad(x.float(), (0, -x.shape[-1] % some)).unflatten(-1, (-1, some))
    most = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0.0)).round()
    return (codes * (most / 127)).flatten(-2)[..., : x.shape[-1]]
