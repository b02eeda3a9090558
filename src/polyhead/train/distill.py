"""Learning from another model: what it finds likely, and the states behind that."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.train.objectives import Loss, Objective

REDUNDANCY = 0.005  # as Zbontar et al. 2021


def distilled(
    objective: Objective,
    teacher: Any,
    *,
    weight: float = 0.5,
    temperature: float = 2.0,
    hidden: float = 0.0,
    correlation: float = 0.0,
) -> Objective:
    """An objective of which a share `weight` is to answer as `teacher` does (Hinton et al. 2015).

    temperature: of both models' answers; the divergence is multiplied by its square, so that the
    shares keep their meaning. hidden: how much the cosine distance between the backbones' last
    states counts besides (DistilBERT, Sanh et al. 2019); correlation: how much `cross_correlation`
    of them does (O'Neill et al. 2021). The teacher stays as it is. In `eval` the objective is as it
    was. Errors: ConfigError for an objective whose `Loss` has no `logits`, and
    for answers or states of other shapes.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight is {weight}: the teacher's share is from 0 to 1")
    if not (temperature > 0 and min(hidden, correlation) >= 0):
        raise ConfigError(
            f"temperature is {temperature}, hidden {hidden} and correlation {correlation}: above "
            "0, and 0 or more"
        )
    teacher = teacher.requires_grad_(False).eval()
    return Distilled(objective, teacher, weight, temperature, hidden, correlation)


@dataclass(frozen=True)
class Distilled:
    """The objective that `distilled` makes."""

    objective: Objective
    teacher: Any
    weight: float
    temperature: float
    hidden: float
    correlation: float

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
        measures = (
            ("hidden", self.hidden, _cosine),
            ("correlation", self.correlation, cross_correlation),
        )
        for name, share, measure in measures:
            if share:
                away = share * hard.tokens * _mean(measure, own, theirs, batch)
                total, parts[name] = total + away, away.detach()
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


def _mean(
    measure: Callable[[Tensor, Tensor], Tensor], own: list[Tensor], theirs: list[Tensor], batch: Any
) -> Tensor:
    """Of the measure of each pass's states `[n, E]`, those of padding left out."""
    found: list[Tensor] = []
    for ours, other in zip(own, theirs, strict=True):
        if ours.shape != other.shape:
            raise ConfigError(
                f"hidden and correlation compare states of {ours.shape[-1]} numbers with the "
                f"teacher's {other.shape[-1]}: set them to 0, or take a teacher of the same width"
            )
        counts = _counts(batch, ours)
        found.append(measure(ours[counts].float(), other[counts].float()))
    return torch.stack(found).mean()


def _counts(batch: Any, states: Tensor) -> Tensor:
    """Where states `[..., E]` are no padding's, `[...]`, by the batch's mask of that shape."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = getattr(batch, name, None)
        if isinstance(mask, Tensor) and mask.shape == states.shape[:-1]:
            return mask.bool()
    return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)


def _cosine(own: Tensor, theirs: Tensor) -> Tensor:
    """The mean distance of two models' states `[n, E]`."""
    return 1 - F.cosine_similarity(own, theirs, dim=-1).mean()


def cross_correlation(own: Tensor, theirs: Tensor) -> Tensor:
    """How far the correlations C `[E, E]` of two models' states `[n, E]` are from the identity.

    The sum of (1 - C_ii)² and, REDUNDANCY times, of C_ij², over E; each number of a state is
    correlated over the n. (Zbontar et al. 2021, equations 1 and 2.)
    """
    own, theirs = (F.normalize(x - x.mean(0), dim=0) for x in (own, theirs))
    correlations = own.T @ theirs
    diagonal = correlations.diagonal()
    others = correlations.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + REDUNDANCY * others) / len(diagonal)


def _logits(loss: Loss) -> Tensor:
    if loss.logits is None:
        raise ConfigError("this objective has no answers to compare with a teacher's")
    return loss.logits()
