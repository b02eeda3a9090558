"""AWQ: columns that read much are scaled up before rounding, and what writes them down.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", section 3.2. What is read becomes more
even by it, and is rounded better where products round it, too (Xiao et al. 2022, "SmoothQuant"). W
columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.compress.calibrate import Group, Inputs, Unit, Walk
from polyhead.compress.layers import EXPERT_WEIGHTS, put_in_experts, put_in_layer
from polyhead.compress.steps import Grid, rounded_inputs
from polyhead.files.digest import tensor_digest
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward

_POWERS = [step / 10 for step in range(1, 10)]
_ROWS = 512  # of a matrix, spread over it, that say how much a scale costs


@dataclass(frozen=True)
class Fold:
    """A part that writes what layers read, so that one may be divided and the others multiplied.

    own: what of a scale of the readers' columns is the writer's. back: the other way.
    """

    writer: nn.Module
    readers: Group
    own: Callable[[Tensor], Tensor] = lambda scale: scale
    back: Callable[[Tensor], Tensor] = lambda scale: scale


def settle(walk: Walk, unit: Unit, grid: Grid) -> None:
    """Scale what can be in a unit, where its answers stay the same, and pack its layers.

    Steps are chosen by the columns' squares everywhere, which is all that post-norm blocks allow.
    """
    found = dict(zip(unit.groups, walk.gather(unit, unit.groups), strict=True))
    for fold in _folds(unit):
        inputs = found[fold.readers]
        if (scale := _best(fold, inputs, grid)) is not None and _applied(walk, unit, fold, scale):
            inputs.squares /= scale[:, None] * scale
            inputs.some[:] = [rows / scale for rows in inputs.some]
    for group, inputs in found.items():
        squares = inputs.squares.diagonal(dim1=-2, dim2=-1)
        for layer in group.layers:
            if not group.part:
                weight: Any = layer.weight
                packed = grid.pack([grid.nearest(weight, squares)], weight.dtype)
                put_in_layer(layer, packed, tensor_digest(weight))
            elif group.part == "down":
                gate = next(own for g, own in found.items() if g.layers == [layer])
                wide = gate.squares.diagonal(dim1=-2, dim2=-1)
                _settle_experts(layer, {"gate": wide, "up": wide, "down": squares}, grid)


def _settle_experts(experts: Any, squares: dict[str, Tensor], grid: Grid) -> None:
    packed = {}
    for name in EXPERT_WEIGHTS:
        weight = getattr(experts, name)
        parts = [grid.nearest(w, own) for w, own in zip(weight, squares[name], strict=True)]
        packed[name] = grid.pack(parts, weight.dtype)
    digests = {name: tensor_digest(getattr(experts, name)) for name in EXPERT_WEIGHTS}
    put_in_experts(experts, packed, digests)


def _folds(unit: Unit) -> Iterator[Fold]:
    """What may be scaled; `_applied` sees whether it may indeed."""
    reading = {layer: group for group in unit.groups for layer in group.layers}
    for group in unit.groups:
        if group.norm is not None:
            yield Fold(group.norm, group)
    for part in unit.module.modules():
        if isinstance(part, MultiHeadAttention) and part.out in reading:
            heads = part.num_kv_heads, part.num_heads // part.num_kv_heads, part.head_dim
            yield Fold(part.v, reading[part.out], *_shared(*heads))
        # What scales the output of up scales that of the activation, too.
        is_linear = isinstance(part, FeedForward) and part.activation is F.relu
        if (isinstance(part, GatedFeedForward) or is_linear) and part.down in reading:
            yield Fold(part.up, reading[part.down])


def _shared(
    groups: int, sharing: int, width: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Scales of query heads to those of the values that they share, and back."""
    return (
        lambda scale: scale.view(groups, sharing, width).mean(1).flatten(),
        lambda own: own.view(groups, 1, width).expand(-1, sharing, -1).flatten(),
    )


def _best(fold: Fold, inputs: Inputs, grid: Grid) -> Tensor | None:
    """The scale `[W]`, a power of the columns' sizes, that costs least; None where none gains."""
    layers: Any = fold.readers.layers
    weights = [layer.weight.detach() for layer in layers]
    weights = [weight[:: -(-len(weight) // _ROWS)].float() for weight in weights]
    sizes = inputs.sizes.clamp_min(1e-4 * float(inputs.sizes.mean()) + 1e-20)
    best, found = _cost(weights, torch.ones_like(sizes), inputs, grid), None
    for power in _POWERS:
        scale = fold.back(fold.own(sizes**power))
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        if (cost := _cost(weights, scale, inputs, grid)) < best:
            best, found = cost, scale
    return found


def _cost(weights: list[Tensor], scale: Tensor, inputs: Inputs, grid: Grid) -> float:
    """The mean square of what the products lose by rounding scaled weights and what they read."""
    read, total = torch.cat(inputs.some) / scale, 0.0
    noise = rounded_inputs(read, grid.form) - read
    for weight in weights:
        wide = weight * scale
        lost = grid.form(wide, grid.group).unpack() / scale - weight
        total += float((lost @ inputs.squares * lost).sum())
        total += float((noise @ wide.mT).square().sum()) / len(noise)
    return total


def _applied(walk: Walk, unit: Unit, fold: Fold, scale: Tensor) -> bool:
    """Scale writer and readers; undone, and False, where the unit answers otherwise then.

    So it is where somebody else reads what is written: a residual, a router.
    """
    kept = [(part, dict(part._parameters)) for part in (fold.writer, *fold.readers.layers)]
    before = walk.answers(unit)
    for layer in fold.readers.layers:
        weight: Any = layer.weight
        layer.weight = _parameter(weight * scale, weight)
    halfway = walk.answers(unit)
    own = fold.own(scale)
    for name, weight in fold.writer.named_parameters(recurse=False):
        by = own[:, None] if weight.ndim == 2 else own
        setattr(fold.writer, name, _parameter(weight / by, weight))
    off, apart = _apart(before, walk.answers(unit)), _apart(before, halfway)
    rounding = 4 * max(float(a.abs().max()) * torch.finfo(a.dtype).eps for a in before)
    if off <= max(0.02 * apart, rounding):
        return True
    for part, parameters in kept:
        part._parameters.update(parameters)
    return False


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=like.requires_grad)


def _apart(before: list[Any], after: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
