"""Learning from another model: what it finds likely, and the states behind that."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.train.objectives import Loss, Objective


def distilled(
    objective: Objective,
    teacher: Any,
    *,
    weight: float = 0.5,
    temperature: float = 2.0,
    hidden: float = 0.0,
) -> Objective:
    """An objective of which a share `weight` is to answer as `teacher` does (Hinton et al. 2015).

    temperature: of both models' answers; the divergence is multiplied by its square, so that the
    shares keep their meaning. hidden: how much the cosine distance between the backbones' last
    states counts besides (DistilBERT, Sanh et al. 2019). The teacher stays as it is. In `eval` the
    objective is as it was. Errors: ConfigError for an objective whose `Loss` has no `logits`, and
    for answers or states of other shapes.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight is {weight}: the teacher's share is from 0 to 1")
    if not (temperature > 0 and hidden >= 0):
        raise ConfigError(
            f"temperature is {temperature} and hidden {hidden}: above 0, and 0 or more"
        )
    return Distilled(objective, teacher.requires_grad_(False).eval(), weight, temperature, hidden)


@dataclass(frozen=True)
class Distilled:
    """The objective that `distilled` makes."""

    objective: Objective
    teacher: Any
    weight: float
    temperature: float
    hidden: float

    def __call__(self, model: Any, batch: Any) -> Loss:
        if not model.training:
            return self.objective(model, batch)
        with _states(model) as own:
            hard = self.objective(model, batch)
        with torch.no_grad(), _states(self.teacher) as theirs:
            told = self.objective(self.teacher.to(hard.total.device), batch)
            wanted = _logits(told)
        answers = _logits(hard)
        if answers.shape != wanted.shape:
            raise ConfigError(
                f"the teacher answers with {list(wanted.shape)} numbers and the model with "
                f"{list(answers.shape)}: take one with the same vocabulary and head"
            )
        likely = F.log_softmax(wanted.float() / self.temperature, -1)
        found = F.log_softmax(answers.float() / self.temperature, -1)
        each = F.kl_div(found, likely, log_target=True, reduction="none").sum(-1)
        # A mean over the answers, as a sum over what the loss counts.
        soft = each.mean() * (hard.tokens * self.temperature**2)
        total = (1 - self.weight) * hard.total + self.weight * soft
        parts = {**(hard.parts or {"loss": hard.total.detach()}), "teacher": soft.detach()}
        if self.hidden:
            away = self.hidden * hard.tokens * _distance(own, theirs)
            total, parts["hidden"] = total + away, away.detach()
        return replace(hard, total=total, parts=parts)


@contextmanager
def _states(model: Any) -> Generator[list[Tensor]]:
    """What the backbone answers with while this is entered."""
    seen: list[Tensor] = []
    backbone: nn.Module = model.backbone

    def note(_: Any, __: Any, answer: Tensor) -> None:
        seen.append(answer)

    handle = backbone.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _distance(own: list[Tensor], theirs: list[Tensor]) -> Tensor:
    for ours, other in zip(own, theirs, strict=True):
        if ours.shape != other.shape:
            raise ConfigError(
                f"hidden compares states of {ours.shape[-1]} numbers with the teacher's "
                f"{other.shape[-1]}: set it to 0, or take a teacher of the same width"
            )
    pairs = zip(own, theirs, strict=True)
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()


def _logits(loss: Loss) -> Tensor:
    if loss.logits is None:
        raise ConfigError("this objective has no answers to compare with a teacher's")
    return loss.logits()
