"""Whole heads and neurons that write nothing: what `shrink` then takes away, answers unchanged.

H heads, D their width, F neurons, N experts, E the model's width.
"""

from typing import Any

import torch
from torch import Tensor

from polyhead.compress.importance import magnitude
from polyhead.compress.structures import Shares, scores_of_heads, smaller, staying_heads
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import Experts

PARTS = ("heads", "neurons")


def least_parts(model: TaskModel, share: float, by: str, done: float = 1.0) -> dict[str, Tensor]:
    """Which weights go, by name: True in what the least heads or neurons write with.

    share: as `shrink` takes it, which would take the same parts away. done: so much of it is gone
    already, the least first. A part that writes nothing is the least, so that none comes back.
    Errors: ConfigError as of `shrink`.
    """
    find = _heads if by == "heads" else _neurons
    return find(model, share, done)


def _heads(model: TaskModel, share: float, done: float) -> dict[str, Tensor]:
    """Columns of the products that write what heads found `[E, H D]`."""
    old, found = model.backbone, magnitude(model)
    stay = staying_heads(old, smaller(model, Shares(heads=share)), found)
    going: dict[str, Tensor] = {}
    for name, scores in scores_of_heads(old, found).items():
        part: Any = old.get_submodule(name)
        assert isinstance(part, MultiHeadAttention)
        least = scores.index_fill(0, stay[name], torch.inf).argsort(stable=True)
        goes = _marked(scores, least[: _some(part.num_heads - len(stay[name]), done)])
        columns = goes.repeat_interleave(part.head_dim)
        going[f"backbone.{name}.out.weight"] = columns.expand_as(part.out.weight).clone()
    return going


def _neurons(model: TaskModel, share: float, done: float) -> dict[str, Tensor]:
    """Columns of the products that write what neurons found `[E, F]`, of experts `[N, E, F]`."""
    wanted, going = smaller(model, Shares(neurons=share)), dict[str, Tensor]()
    for name, scores in magnitude(model).neurons.items():
        part, left = model.backbone.get_submodule(name), wanted.get_submodule(name)
        count = _width(part) - _width(left)
        goes = _marked(scores, scores.argsort(dim=-1, stable=True)[..., : _some(count, done)])
        if isinstance(part, Experts):
            going[f"backbone.{name}.down"] = goes[:, None].expand_as(part.down).clone()
        else:
            down: Any = part.down
            going[f"backbone.{name}.down.weight"] = goes.expand_as(down.weight).clone()
    return going


def _width(part: Any) -> int:
    """A feed-forward's neurons, or those of each expert."""
    if isinstance(part, Experts):
        return part.down.shape[-1]
    assert isinstance(part, FeedForward | GatedFeedForward)
    return part.down.in_features


def _marked(scores: Tensor, index: Tensor) -> Tensor:
    """True at some places of the scores `[..., n]`."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def _some(count: int, done: float) -> int:
    return int(count * done + 0.5)
