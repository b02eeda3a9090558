"""AdamW that needs no schedule: an average of its path takes the place of falling rates.

Defazio et al. 2024, "The Road Less Scheduled", Algorithm 1.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class ScheduleFree(Optimizer):
    """Gradients are taken at the weights y, between z, which they move, and the average x of z.

    averages: x of each weight, the model that is to be used; at first the weights themselves.
    lr: after the warm-up always the same; steps count in the average by its largest, squared.
    betas: how far y lies from z towards x, and AdamW's average of squares.
    """

    def __init__(
        self,
        params: Iterable[Any],
        averages: Mapping[Tensor, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, given)
        self.averages = averages

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, y: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr, (near, far) = group["lr"], group["betas"]
        state, x = self._state(y), self.averages[y]
        z, squares = state["z"], state["exp_avg_sq"]
        state["step"] += 1
        state["largest_lr"].clamp_(min=lr)
        weight = float(state["largest_lr"]) ** 2
        state["weights"] += weight
        squares.mul_(far).addcmul_(grad, grad, value=1 - far)
        size = (squares / (1 - far ** float(state["step"]))).sqrt_().add_(group["eps"])
        z.sub_((grad / size).add_(y, alpha=group["weight_decay"]), alpha=lr)
        x.lerp_(z, weight / float(state["weights"]) if weight else 0.0)
        y.copy_(z.lerp(x, near))

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["z"] = param.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(param)
            # Counts are numbers of the CPU, as a step reads them.
            for name in ("step", "weights", "largest_lr"):
                state[name] = torch.zeros(())
        return state
