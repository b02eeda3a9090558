"""Lion: the sign of a momentum, and nothing else, moves each weight (Chen et al. 2023)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Algorithm 2 of the paper: one moment a weight where AdamW keeps two.

    lr: every weight moves by just this, so a third to a tenth of AdamW's; weight_decay: as much
    more.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            lr, (near, far) = group["lr"], group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                moment = self._moment(param)
                param.mul_(1 - lr * group["weight_decay"])
                param.sub_(moment.lerp(param.grad, 1 - near).sign_(), alpha=lr)
                moment.lerp_(param.grad, 1 - far)

    def _moment(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
        return state["exp_avg"]
