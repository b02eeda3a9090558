"""AdamW over float32 masters, and learning rates as pure functions of the step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyhead.errors import PolyheadError
from polyhead.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 … config.steps - 1: linear warm-up, then the schedule's course."""
    steps, low = config.steps, config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = config.warmup if config.warmup < steps else steps // 10
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup if config.schedule != "wsd" else max(warmup, steps - int(config.decay * steps))
    # 0 at the first step after `start`, 1 at the last of the run.
    done = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    if config.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return config.lr + (low - config.lr) * done


class MasterAdamW:
    """AdamW whose weights and moments are float32, whatever the model's weights are.

    In float32 the masters are the parameters themselves. Otherwise the model's parameters become
    `dtype`, and each step writes the rounded masters to them. Matrices (and embeddings) decay;
    norms and biases do not. Gradients of several backward passes are summed in float32.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.clip = config.clip
        dtype = getattr(torch, config.dtype)
        self.masters: list[Tensor] = [p.detach().float() for p in self.params]
        for param in model.parameters():
            if param.is_floating_point():
                param.data = param.data.to(dtype)
        self.separate = dtype != torch.float32
        if not self.separate:
            self.masters = list(self.params)
        groups = [
            {
                "params": [m for m in self.masters if m.ndim >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    def collect(self) -> None:
        """Add the gradients of a backward pass to the masters' and free them (no-op in float32)."""
        if not self.separate:
            return
        for master, param in zip(self.masters, self.params, strict=True):
            if param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad += param.grad
            param.grad = None

    def discard(self) -> None:
        """Free every gradient, unused."""
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update, and clear the gradients; the norm before clipping.

        A norm that is not finite raises PolyheadError and leaves every weight as it is.
        """
        norm = torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        value = float(norm)
        if not math.isfinite(value):
            raise PolyheadError(f"the gradient's norm is {value}: lower lr, or check the data")
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._round()
        return value

    def _round(self) -> None:
        """Write the masters to the model's own weights."""
        if self.separate:
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by parameter name."""
        state = {}
        for name, master in zip(self.names, self.masters, strict=True):
            state[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state[master].items():
                state[f"{key}.{name}"] = value
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave; the model's weights follow the masters."""
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(state[f"master.{name}"])
                found = {
                    key: state[f"{key}.{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in state
                }
                # AdamW keeps its step count on the CPU or beside the weights, as it made it.
                self.adamw.state[master] = {
                    key: value.to(master.device) for key, value in found.items()
                }
            self._round()
