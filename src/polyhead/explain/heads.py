"""What kind of head each is, by where it looks: measured on its weights over some texts.

B texts, T tokens, H heads. Each measure is a share of a query's weight, or a mean, from 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.explain import reduce
from polyhead.explain.capture import capture
from polyhead.explain.inputs import Inputs, call, counted_tokens, token_ids
from polyhead.models.model import TaskModel

FARTHEST = 8


@dataclass(frozen=True)
class Text:
    """The tokens that weights `[B, H, T, T]` are of: ids `[B, T]`, and which count or part them."""

    ids: Tensor
    keep: Tensor
    delimiters: Tensor


Measure = Callable[[Tensor, Text], tuple[Tensor, Tensor]]
"""Weights `[B, H, T, T]` to a number for each query `[B, H, T]`, and which of them mean it."""


class Head(NamedTuple):
    """One head, by its attention's number among those measured and name, and its measure."""

    layer: int
    head: int
    name: str
    value: float


@dataclass(frozen=True)
class HeadScores:
    """`measures[measure][name]`, `[H]`: the mean over queries of all texts."""

    measures: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> dict[str, Tensor]:
        return self.measures[measure]

    def table(self, measure: str) -> Tensor:
        """`[layers, H]`, NaN where a layer has fewer heads than others."""
        rows = list(self.measures[measure].values())
        table = torch.full((len(rows), max(map(len, rows))), torch.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return table

    def best(self, measure: str, count: int | None = None, least: float = 0.0) -> list[Head]:
        """Heads by a measure, falling: those of at least so much, so many of them at most."""
        found = [
            Head(layer, head, name, value)
            for layer, (name, values) in enumerate(self.measures[measure].items())
            for head, value in enumerate(values.tolist())
            if value >= least
        ]
        return sorted(found, key=lambda head: -head.value)[:count]


def _all(text: Text) -> Tensor:
    return text.keep


def _later(text: Text) -> Tensor:
    """Tokens that have one before them, on whichever side the padding is."""
    return text.keep & (text.keep.cumsum(1) > 1)


def _first(text: Text) -> Tensor:
    """Where each text begins, `[B]`."""
    return text.keep.int().argmax(1)


def _at(weights: Tensor, offset: int) -> Tensor:
    """What each query gives the key so many tokens before it, `[B, H, T]`; 0 beyond the edge."""
    found = weights.new_zeros(weights.shape[:3])
    begin, end = max(0, offset), weights.shape[2] + min(0, offset)
    found[:, :, begin:end] = weights.diagonal(-offset, 2, 3)
    return found


def _distances(weights: Tensor) -> Tensor:
    at = torch.arange(weights.shape[2], device=weights.device)
    return (at[:, None] - at).abs()


def _entropy(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    return reduce.entropy(weights), _all(text)


def _distance(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    return (weights * _distances(weights)).sum(-1), _all(text)


def _sink(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    index = _first(text)[:, None, None, None].expand(*weights.shape[:3], 1)
    return weights.gather(-1, index)[..., 0], _later(text)


def _itself(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    return _at(weights, 0), _later(text)


def _previous(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    return _at(weights, 1), _later(text)


def _positional(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """The share of the one offset, of a few, that a head gives most."""
    near = min(FARTHEST, weights.shape[2] - 1)
    shares = torch.stack([_at(weights, offset) for offset in range(-near, near + 1)])
    counts = _later(text)
    means = (shares * counts[:, None]).sum((1, 3)) / counts.sum().clamp_min(1)  # [offsets, H]
    heads = torch.arange(weights.shape[1], device=weights.device)
    return shares[means.argmax(0), :, heads].transpose(0, 1), counts


def _duplicate(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """On other tokens that are the same."""
    same = _same(text.ids) & (_distances(weights) > 0)
    return _of(weights, same, text)


def _induction(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """On what followed an earlier token that is the same (Olsson et al. 2022)."""
    after = torch.zeros_like(_same(text.ids))
    after[:, :, 1:] = _same(text.ids)[:, :, :-1]
    return _of(weights, after.tril(), text)


def _delimiter(weights: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """On marks, separators and ends, but for the first token."""
    marks = text.delimiters.clone()
    marks[torch.arange(len(marks), device=marks.device), _first(text)] = False
    return _of(weights, marks[:, None].expand(-1, weights.shape[2], -1), text)


def _of(weights: Tensor, wanted: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    """The weight on wanted keys `[B, T, T]`, of queries that can see one."""
    seen = weights.amax(1) > 0
    return (weights * wanted[:, None]).sum(-1), text.keep & (wanted & seen).any(-1)


def _same(ids: Tensor) -> Tensor:
    return ids[:, :, None] == ids[:, None]


MEASURES: Mapping[str, Measure] = {
    "entropy": _entropy,
    "distance": _distance,
    "sink": _sink,
    "itself": _itself,
    "previous": _previous,
    "positional": _positional,
    "duplicate": _duplicate,
    "induction": _induction,
    "delimiter": _delimiter,
}
"""entropy in nats and distance in tokens; the others are shares of the weight: on the first token,
itself, the one before, at any one offset, on equal tokens, on what followed them, on marks."""


@torch.no_grad()
def head_scores(
    model: TaskModel, inputs: Inputs, delimiters: Tensor | None = None, where: str = "*"
) -> HeadScores:
    """Every measure of `MEASURES` of every head of self-attention, over some texts.

    inputs: token ids `[B, T]`, or what the model is called with by name. delimiters: `[B, T]` true
    where a token is a mark that parts others. where: as of `capture`. No layer's weights are kept.
    """
    ids, keep = token_ids(inputs), counted_tokens(inputs)
    marks = torch.zeros_like(keep) if delimiters is None else delimiters.to(keep)
    text = Text(ids, keep, marks)

    def measured(weights: Tensor) -> Tensor:
        if weights.shape[2:] != (ids.shape[1], ids.shape[1]):
            return weights.new_empty(0)  # cross-attention, or an image's
        return measures_of(weights, text)

    with capture(model, where, reduce=measured) as seen:
        call(model, inputs)
    found = {
        name: values.cpu()
        for name, values in seen.items()
        if len(values) and not _is_elsewhere(name, inputs)
    }
    return HeadScores(
        {
            measure: {name: values[number] for name, values in found.items()}
            for number, measure in enumerate(MEASURES)
        }
    )


def _is_elsewhere(name: str, inputs: Inputs) -> bool:
    """Whether an attention is not of the text: of a decoder that reads one, of an image's tower."""
    parts = name.split(".")
    reads = not isinstance(inputs, Tensor) and "decoder_input_ids" in inputs
    return "vision" in parts or (reads and ("decoder" in parts or "cross" in parts))


def measures_of(weights: Tensor, text: Text) -> Tensor:
    """Every measure of weights `[B, H, T, T]` over a text: `[measures, H]`."""
    return torch.stack([_mean(*measure(weights.float(), text)) for measure in MEASURES.values()])


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Over the queries that count, of all texts: `[H]`."""
    return (values * counts[:, None]).sum((0, 2)) / counts.sum().clamp_min(1)


def repeated(
    ids: Tensor, length: int, rows: int, seed: int = 0, begin: int | None = None
) -> Tensor:
    """Random runs of some of the ids, each written twice: `[rows, 2 length]`, or one more.

    What the second of them can be foretold by is the first alone. begin: the id before.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(ids), (rows, length), generator=generator)
    once = ids.cpu()[index]
    first = once.new_full((rows, 1), begin) if begin is not None else once[:, :0]
    return torch.cat([first, once, once], 1).to(ids.device)
