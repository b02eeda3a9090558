"""SiFT: a model that answers alike when its embeddings move a little (He et al. 2021, section 6).

As in Microsoft's source: the embeddings are normalised before they are moved, so that the same
step means the same in every model and for every word. Nothing of it stays in the model: what its
own norm makes of normalised embeddings is, but for rounding, what it makes of them as they are.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.train.objectives import Loss, Objective

NORM = "embedding_norm"
_EPS = 1e-7  # of the norm without weights
_LOWEST = -1e9
_SMALL = 1e-6  # keeps a gradient of zero from being divided by


def sift(
    objective: Objective, *, weight: float = 5.0, lr: float = 1e-4, std: float = 1e-2
) -> Objective:
    """An objective with the symmetric KL between clean and moved answers beside its loss.

    weight: of that term (5 in the published fine-tuning). lr: the largest element of the one step
    along the gradient, for each token. std: of the random start, clipped at two of them. It costs
    two more passes. Needs a backbone with a norm after its embeddings, called `embedding_norm`,
    and an objective whose `Loss` has `logits`; otherwise ConfigError. In `eval` the objective
    is as it was.
    """
    for name, value in (("weight", weight), ("lr", lr), ("std", std)):
        if not value > 0:
            raise ConfigError(f"sift's {name} is {value}: set it above 0")
    return Sift(objective, weight, lr, std)


@dataclass(frozen=True)
class Sift:
    """The objective that `sift` makes."""

    objective: Objective
    weight: float
    lr: float
    std: float

    def __call__(self, model: Any, batch: Any) -> Loss:
        if not model.training:
            return self.objective(model, batch)
        norm = embedding_norm(model)
        inputs: list[Tensor] = []

        def normalise(x: Tensor) -> Tensor:
            inputs.append(F.layer_norm(x, x.shape[-1:], eps=_EPS))
            return inputs[-1]

        with _before(norm, normalise):
            clean = self.objective(model, batch)
        logits = _logits(clean)
        base = [x.detach() for x in inputs]
        moves = [self._start(x) for x in base]
        with _frozen(model):
            moved = self._moved(model, batch, norm, base, moves)
            gradients = torch.autograd.grad(divergence(moved, logits.detach()).sum(), moves)
        steps = [self._step(move.detach(), g) for move, g in zip(moves, gradients, strict=True)]
        moved = self._moved(model, batch, norm, base, steps)
        # The mean over the answers, as a sum over what the loss counts.
        extra = divergence(moved, logits).mean() * (self.weight * clean.tokens)
        parts = clean.parts or {"loss": clean.total.detach()}
        return replace(clean, total=clean.total + extra, parts={**parts, "sift": extra.detach()})

    def _start(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, device=x.device) * self.std
        return noise.clamp(-2 * self.std, 2 * self.std).requires_grad_()

    def _step(self, move: Tensor, gradient: Tensor) -> Tensor:
        """One step uphill; none where the gradient is not finite."""
        step = gradient / (_SMALL + gradient.abs().amax(-1, keepdim=True))
        return move + self.lr * torch.where(gradient.norm().isfinite(), step, 0.0)

    def _moved(
        self, model: Any, batch: Any, norm: nn.Module, base: Sequence[Tensor], by: Sequence[Tensor]
    ) -> Tensor:
        """Logits of a pass whose normalised embeddings are moved."""
        moves = iter(zip(base, by, strict=True))

        def move(x: Tensor) -> Tensor:
            still, delta = next(moves)
            return (still.float() + delta).to(x.dtype)

        with _before(norm, move):
            return _logits(self.objective(model, batch))


def divergence(moved: Tensor, clean: Tensor) -> Tensor:
    """KL(clean ‖ moved) + KL(moved ‖ clean) of logits [..., C], a value for each answer, in fp32.

    Each term's gradient goes to the distribution that is to come nearer, the other one stands
    still, as in the source. Where an answer is one number (regression), its squared distance.
    """
    if moved.shape[-1] == 1:
        return (moved.float() - clean.float()).square().flatten()
    # What is ruled out (-inf, as padding is for an answer's ends) stays so, and gives no nan.
    p, q = (side.float().clamp(min=_LOWEST).log_softmax(-1) for side in (clean, moved))
    there = F.kl_div(q, p.detach(), reduction="none", log_target=True)
    back = F.kl_div(p, q.detach(), reduction="none", log_target=True)
    return (there + back).sum(-1).flatten()


def embedding_norm(model: Any) -> nn.Module:
    """The norm after a backbone's embeddings."""
    norm = getattr(model.backbone, NORM, None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        kind = getattr(model.config, "model_type", type(model.backbone).__name__)
        raise ConfigError(
            f"sift moves what enters the norm after the embeddings, and {kind} has none: "
            "train it without sift, or take a model of BERT's kind"
        )
    return norm


def _logits(loss: Loss) -> Tensor:
    if loss.logits is None:
        raise ConfigError("this objective gives no logits to compare: train it without sift")
    return loss.logits()


@contextmanager
def _before(norm: nn.Module, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """`change` the norm's input for a while."""
    handle = norm.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """No weight asks for a gradient for a while: the pass inside is for the move's alone."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
