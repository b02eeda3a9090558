"""Muon: momentum whose matrices are made orthogonal before they are taken (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of the quintic iteration; its fixed point is not one, but near it, and is reached in five steps.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
RMS = 0.2  # of an AdamW update, so that one learning rate does for both (Liu et al. 2025, eq. 4)


class Muon(Optimizer):
    """Matrices `[..., R, W]`, those of one shape orthogonalised together.

    lr, weight_decay: as AdamW's; an update is scaled to the size of one of AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    alike[tuple(param.shape[-2:])].append(param)
            for params in alike.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        directions = [self._momentum(param, group) for param in params]
        sizes = [direction.shape[:-2].numel() for direction in directions]
        flat = torch.cat([direction.flatten(0, -3) if direction.ndim > 2 else direction[None]
                          for direction in directions])  # fmt: skip
        updates = orthogonal(flat)
        rows, columns = updates.shape[-2:]
        lr, scale = group["lr"], RMS * max(rows, columns) ** 0.5
        for param, update in zip(params, updates.split(sizes), strict=True):
            param.mul_(1 - lr * group["weight_decay"])
            param.add_(update.view_as(param).to(param.dtype), alpha=-lr * scale)

    def _momentum(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[param], param.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with singular values near one, `[N, R, W]`, by Newton and Schulz in
    bfloat16."""
    x = x.bfloat16()
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if turned else x
