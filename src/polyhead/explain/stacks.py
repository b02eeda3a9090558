"""A running model's attention as the stacks of a page: bytes and measures, layer by layer.

L layers, H heads, Q queries, K keys, h × w the grid of an image's patches.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain import heads as text_heads
from polyhead.explain import reduce
from polyhead.explain.answers import stack_of
from polyhead.explain.capture import Seen, capture
from polyhead.explain.heads import Text
from polyhead.explain.images import stage_grid, windows_of
from polyhead.explain.inputs import Inputs, call
from polyhead.explain.packing import bytes_of
from polyhead.explain.page import Picture, Side, Stack
from polyhead.explain.places import chosen
from polyhead.models.model import TaskModel
from polyhead.nn.patches import Grid

Measured = Callable[[Tensor], dict[str, Tensor]]
"""Weights `[1, H, Q, K]` to a number for each head `[H]`, by the measure's name."""


@dataclass(frozen=True)
class Tokens:
    """A side, and what measures go by: a text, an image's grid of patches, or both."""

    side: Side
    text: Text | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class Reader:
    """What a model is called with, and the tokens that each part of it sees.

    parts: by a word of the part's name ("encoder", "vision"), or "" for the rest. source: those
    that cross-attention looks at.
    """

    inputs: Inputs
    parts: dict[str, Tokens]
    source: Tokens | None = None

    def sides(self, place: str) -> tuple[Tokens, Tokens]:
        """Who looks in an attention of this name, and at what."""
        words = place.split(".")
        found = [self.parts[word] for word in words if word in self.parts]
        tokens = found[0] if found else self.parts[""]
        is_cross = words[-1].partition("@")[0] == "cross"
        return tokens, self.source if is_cross and self.source is not None else tokens


@torch.no_grad()
def stacks_of(
    model: TaskModel, reader: Reader, where: str = "*"
) -> tuple[list[Side], list[Stack], list[Tokens]]:
    """What a page shows of one forward: its sides, its stacks, and who looks in each of these.

    where: as of `capture`, whose errors it raises.
    """
    seen: dict[str, Seen] = {}
    found: dict[str, list[dict[str, Tensor]]] = {}
    with ExitStack() as looking:
        run = where.partition("@")[1:]
        for name in chosen(model, where, "weights"):
            found[name] = []
            each = _kept(_measured(*reader.sides(name)), found[name])
            seen[name] = looking.enter_context(capture(model, "".join((name, *run)), reduce=each))
        call(model, reader.inputs)
    groups = _grouped(seen)
    everywhere = _grouped(chosen(model, "*", "weights"))
    sides: list[Side] = []
    stacks: list[Stack] = []
    looking_tokens: list[Tokens] = []
    for group, names in groups.items():
        if not any(seen[name] for name in names):
            continue  # nothing was asked of this part, such as of the image tower by a text
        pair = [_staged(tokens, group) for tokens in reader.sides(names[0])]
        for tokens in pair:
            if tokens.side not in sides:
                sides.append(tokens.side)
        stacks.append(
            _stack(
                model,
                group,
                {name: seen[name] for name in names},
                found,
                sides,
                pair,
                everywhere[group],
            )
        )
        looking_tokens.append(pair[0])
    return sides, stacks, looking_tokens


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Attentions by the stack and the part of a block that they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block, _, part = name.rpartition(".")
        groups.setdefault(f"{stack_of(block)}{part}", []).append(name)
    return groups


def _number(run: str, runs: int, names: Sequence[str]) -> int:
    """Of a layer among all: one that serves several depths stands for as many."""
    place, _, depth = run.partition("@")
    return names.index(place) * runs + int(depth or 0)


def _kept(measured: Measured, found: list[dict[str, Tensor]]) -> Callable[[Tensor], Tensor]:
    def keep(weights: Tensor) -> Tensor:
        if not bool(weights.isfinite().all()):
            raise ConfigError("attention's weights are not numbers (NaN); the model is broken")
        found.append(measured(weights.float()))
        return bytes_of(weights)

    return keep


def _measured(queries: Tokens, keys: Tokens) -> Measured:
    if queries is not keys:
        return _of_cross
    if queries.grid is not None and queries.text is None:
        return _of_patches(queries)
    text = queries.text
    assert text is not None

    def of_text(weights: Tensor) -> dict[str, Tensor]:
        values = text_heads.measures_of(weights, text).cpu()
        return dict(zip(text_heads.MEASURES, values, strict=True))

    return of_text


def _of_cross(weights: Tensor) -> dict[str, Tensor]:
    """How pointed: the mean of each query's largest share."""
    return {
        "pointed": weights.amax(-1).mean((0, 2)).cpu(),
        "entropy": reduce.entropy(weights).mean((0, 2)).cpu(),
    }


def _of_patches(tokens: Tokens) -> Measured:
    def measured(weights: Tensor) -> dict[str, Tensor]:
        found = {"entropy": reduce.entropy(weights).mean((0, 2)).cpu()}
        grid, picture = tokens.grid, tokens.side.picture
        if grid is None or picture is None or weights.shape[2] != len(tokens.side.tokens):
            return found
        first, count = picture.first, grid[0] * grid[1]
        rows = torch.arange(count, device=weights.device) // grid[1]
        columns = torch.arange(count, device=weights.device) % grid[1]
        apart = torch.hypot((rows[:, None] - rows).float(), (columns[:, None] - columns).float())
        among = weights[:, :, first : first + count, first : first + count]
        shares = among / among.sum(-1, keepdim=True).clamp_min(1e-9)
        found["distance"] = (shares * apart).sum(-1).mean((0, 2)).cpu()
        if first:
            found["class token"] = weights[:, :, first:, 0].mean((0, 2)).cpu()
        return found

    return measured


def _staged(tokens: Tokens, group: str) -> Tokens:
    """Of a Swin's further stages the grid is smaller."""
    words = group.split(".")
    if "stages" not in words or tokens.grid is None or tokens.side.picture is None:
        return tokens
    stage = int(words[words.index("stages") + 1])
    grid = stage_grid(tokens.grid, stage)
    return patches(tokens.side.picture.src, grid) if stage else tokens


def patches(src: str, grid: Grid, before: Sequence[str] = ()) -> Tokens:
    """An image's patches as tokens, after those that stand before them."""
    names = [f"r{row} c{column}" for row in range(grid[0]) for column in range(grid[1])]
    return Tokens(Side([*before, *names], Picture(src, *grid, len(before))), grid=grid)


def _stack(
    model: TaskModel,
    group: str,
    seen: dict[str, Seen],
    found: dict[str, list[dict[str, Tensor]]],
    sides: Sequence[Side],
    pair: Sequence[Tokens],
    names: Sequence[str],
) -> Stack:
    layers = {
        run: (weights, measures)
        for name, runs in seen.items()
        for (run, weights), measures in zip(runs.items(), found[name], strict=True)
    }
    table = {
        measure: [_row(own[measure]) for _, own in layers.values()]
        for measure in next(iter(layers.values()))[1]
    }
    places: list[list[int]] | None = None
    if ".stages." in f".{group}":
        assert pair[0].grid is not None
        grid = pair[0].grid
        places = [
            windows_of(model, name, weights, grid).places.tolist()
            for name, (weights, _) in layers.items()
        ]
    return Stack(
        _name(group), sides.index(pair[0].side), sides.index(pair[1].side), list(layers),
        torch.stack([w[0] if places is None else w.transpose(0, 1) for w, _ in layers.values()]),
        places, table,
        [_number(run, len(runs), names) for runs in seen.values() for run in runs],
    )  # fmt: skip


def _row(values: Tensor) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


def _name(group: str) -> str:
    """What a reader calls a stack."""
    words = group.split(".")
    if words[-1] == "cross":
        return "cross-attention"
    if "stages" in words:
        return f"stage {words[words.index('stages') + 1]}"
    known = {
        "encoder": "encoder", "decoder": "decoder", "vision": "image", "text": "text",
        "language": "text",
    }  # fmt: skip
    return next((known[word] for word in words if word in known), "self-attention")
