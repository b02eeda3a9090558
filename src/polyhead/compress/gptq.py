"""GPTQ: a matrix rounded column by column, the rest made up for each (Frantar et al. 2022).

R rows, W columns.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.calibrate import Group, Inputs, Unit, Walk
from polyhead.compress.layers import put_in_experts, put_in_layer
from polyhead.compress.steps import Grid, Rounded, fitted
from polyhead.files.digest import tensor_digest

_BLOCK = 128  # columns whose effect on the rest is applied at once
_DAMPING = 0.01  # of the mean square, added to all (section 3.3)


def settle(walk: Walk, unit: Unit, grid: Grid) -> None:
    """Pack the layers of a unit, each by what it reads once those before it are in few bits."""
    for group in unit.groups:
        (inputs,) = walk.gather(unit, [group])
        if group.part:
            _settle_experts(group, inputs, grid)
            continue
        for layer in group.layers:
            weight: Any = layer.weight
            packed = grid.pack([rounded(weight, inputs.squares, grid)], weight.dtype)
            put_in_layer(layer, packed, tensor_digest(weight))


def _settle_experts(group: Group, inputs: Inputs, grid: Grid) -> None:
    """Gate and up first, which stand as rounded floats until down is packed with them."""
    experts: Any = group.layers[0]
    for name in ("gate", "up") if group.part == "gate" else ("down",):
        weight = getattr(experts, name)
        pairs = zip(weight, inputs.squares, strict=True)
        packed = grid.pack([rounded(own, squares, grid) for own, squares in pairs], weight.dtype)
        waiting = vars(experts).setdefault("waiting", {})
        waiting[name] = packed, tensor_digest(weight)
        setattr(experts, name, nn.Parameter(packed.unpack().view_as(weight), requires_grad=False))
    if group.part == "down":
        waiting = vars(experts).pop("waiting")
        put_in_experts(experts, *({n: pair[i] for n, pair in waiting.items()} for i in (0, 1)))


def rounded(weight: Tensor, squares: Tensor, grid: Grid) -> Rounded:
    """A matrix `[R, W]` on a grid, so that its products with inputs change least.

    squares: the mean of the inputs' outer products `[W, W]`. Steps are chosen first, each weighed
    by its column's square; columns go by falling square, as those matter most that go first.
    """
    form, group = grid.form, grid.group
    columns = weight.detach().float().T
    diagonal = squares.diagonal()
    steps = fitted(form, columns.T, group, diagonal)
    order = diagonal.argsort(descending=True, stable=True)
    upper = _inverse_root(squares[order][:, order].double()).float()
    columns, places = columns[order].clone(), (order // group).tolist()
    wide = [part.float().T.contiguous() for part in steps]
    width = len(columns)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = torch.empty_like(columns[start:stop])
        for at in range(start, stop):
            own = [part[places[at]] for part in wide]
            rounded = form.values(form.nearest(columns[at], *own), *own)
            error = (columns[at] - rounded) / upper[at, at]
            columns[at] = rounded
            columns[at + 1 : stop].addr_(upper[at, at + 1 : stop], error, alpha=-1)
            errors[at - start] = error
        columns[stop:] -= upper[start:stop, stop:].T @ errors
    found = torch.empty_like(columns)
    found[order] = columns
    return found.T, steps


def _inverse_root(squares: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse `[W, W]`, damped until there is one."""
    diagonal = squares.diagonal()
    # A column that nothing was read from tells nothing of the others, and is only rounded.
    diagonal[diagonal <= 0] = 1.0
    eye = torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
    damping = _DAMPING * diagonal.mean()
    while True:
        root, failed = torch.linalg.cholesky_ex(squares + damping * eye)
        if not failed:
            inverse = torch.cholesky_inverse(root)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping = damping * 10
