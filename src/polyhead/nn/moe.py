"""A mixture of experts: each token goes to the few experts its router chooses."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.feedforward import GatedFeedForward, activation_named


class Router(nn.Linear):
    """Logits for each expert: `[tokens, E]` to `[tokens, N]`. `routing` watches them."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, bias=False)


FEW_ROWS = 64  # below it a compiled step gathers, so that it compiles once


class Experts(nn.Module):
    """N gated feed-forwards, stacked: gate and up `[N, F, E]`, down `[N, E, F]`."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = activation_named(activation)
        bound_in, bound_out = d_model**-0.5, d_ff**-0.5
        wide, narrow = (num_experts, d_ff, d_model), (num_experts, d_model, d_ff)
        self.gate = nn.Parameter(torch.empty(wide).uniform_(-bound_in, bound_in))
        self.up = nn.Parameter(torch.empty(wide).uniform_(-bound_in, bound_in))
        self.down = nn.Parameter(torch.empty(narrow).uniform_(-bound_out, bound_out))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x `[rows, E]`, sorted by expert; counts `[N]`, the rows of each; returns `[rows, E]`."""
        if _grouped_kernel_takes(x, self.gate):
            ends = counts.cumsum(0).to(torch.int32)
            gate = F.grouped_mm(x, self.gate.transpose(1, 2), offs=ends)
            up = F.grouped_mm(x, self.up.transpose(1, 2), offs=ends)
            down = self.down.transpose(1, 2)
            return F.grouped_mm(self.activation(gate) * up, down, offs=ends)
        if torch.compiler.is_compiling() and len(x) <= FEW_ROWS:
            return self._gathered(x, counts)
        # Unbound, so that one stack of gradients is made and not a sum of as many as experts.
        experts = zip(*(w.unbind() for w in (self.gate, self.up, self.down)), strict=True)
        groups = zip(x.split(counts.tolist()), experts, strict=True)
        return torch.cat([self._one(group, *own) for group, own in groups if len(group)])

    def _gathered(self, x: Tensor, counts: Tensor) -> Tensor:
        """Each row with its own copy of its expert: shapes that no routing changes."""
        experts = torch.arange(len(counts), device=x.device)
        experts = experts.repeat_interleave(counts, output_size=len(x))
        gate, up = (w[experts] @ x[:, :, None] for w in (self.gate, self.up))
        return (self.down[experts] @ (self.activation(gate) * up))[:, :, 0]

    def _one(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, gate)) * F.linear(x, up), down)


def _grouped_kernel_takes(x: Tensor, weight: Tensor) -> bool:
    """One launch for all experts; elsewhere torch falls back to a loop slower than ours."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


class MixtureOfExperts(nn.Module):
    """Top-k routing with softmax weights over all experts (Jiang et al. 2024, section 2).

    renormalize:     the chosen weights sum to one.
    capacity_factor: while training, an expert takes at most `factor * tokens * k / N`; those of
                     lowest weight over it are dropped and pass by the residual. None: no limit.
    shared_d_ff:     width of a shared expert that sees every token; shared_gate weighs it by a
                     sigmoid of the token (Qwen2-MoE).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        renormalize: bool = True,
        capacity_factor: float | None = None,
        shared_d_ff: int | None = None,
        shared_gate: bool = False,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor is {capacity_factor}; it must be above 0")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; choose 1 to {num_experts} of the experts")
        self.num_experts, self.top_k = num_experts, top_k
        self.renormalize, self.capacity_factor = renormalize, capacity_factor
        self.router = Router(d_model, num_experts)
        self.experts = Experts(num_experts, d_model, d_ff, activation)
        self.shared = GatedFeedForward(d_model, shared_d_ff, activation) if shared_d_ff else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., E]` to `[..., E]`."""
        tokens = x.flatten(0, -2)
        mixed = self._mix(tokens)
        if self.shared is not None:
            shared = self.shared(tokens)
            if self.shared_gate is not None:
                shared = self.shared_gate(tokens).sigmoid() * shared
            mixed = mixed + shared
        return mixed.view_as(x)

    def _mix(self, tokens: Tensor) -> Tensor:
        probabilities = self.router(tokens).float().softmax(-1)
        chosen, experts = probabilities.topk(self.top_k, dim=-1)  # [tokens, k]
        if self.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        if self.training and self.capacity_factor is not None:
            chosen = chosen * self._within_capacity(chosen, experts)

        by_expert = experts.flatten().argsort(stable=True)  # sorted dispatch
        rows = by_expert // self.top_k
        flat = experts.flatten()
        counts = flat.new_zeros(self.num_experts).scatter_add(0, flat, torch.ones_like(flat))
        outputs = self.experts(tokens[rows], counts)
        outputs = outputs * chosen.flatten()[by_expert, None].to(outputs.dtype)
        return torch.zeros_like(tokens).index_add(0, rows, outputs)

    def _within_capacity(self, chosen: Tensor, experts: Tensor) -> Tensor:
        """1 where a choice is among its expert's heaviest up to capacity, `[tokens, k]`."""
        assert self.capacity_factor is not None
        capacity = math.ceil(self.capacity_factor * experts.numel() / self.num_experts)
        heaviest = chosen.flatten().argsort(descending=True, stable=True)
        order = heaviest[experts.flatten()[heaviest].argsort(stable=True)]
        counts = experts.flatten().bincount(minlength=self.num_experts)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device)
        rank = rank - starts[experts.flatten()]
        return (rank < capacity).view_as(experts).to(chosen.dtype)


@contextmanager
def routing(model: nn.Module) -> Generator[list[Tensor]]:
    """The router logits `[tokens, N]` of every layer, in order, of the forwards run inside."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        seen.append(logits)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def load_balance_loss(logits: Sequence[Tensor], top_k: int, keep: Tensor | None = None) -> Tensor:
    """N times the product of each expert's share of choices and of probability, summed.

    logits: `[tokens, N]` a layer, pooled over the layers before the product, as transformers
    does; so perfect balance gives `top_k`. keep: `[tokens]` bool, false on padding.
    (Fedus et al. 2021, equations 4 to 6.)
    """
    pooled = torch.cat([layer.float() if keep is None else layer[keep].float() for layer in logits])
    probabilities = pooled.softmax(-1)
    choices = probabilities.topk(top_k, dim=-1).indices
    num_experts = pooled.shape[-1]
    share = choices.flatten().bincount(minlength=num_experts) / len(pooled)
    return num_experts * (share * probabilities.mean(0)).sum()


def z_loss(logits: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
    """Mean squared log of the routers' normaliser (Zoph et al. 2022, equation 5)."""
    pooled = torch.cat([layer.float() if keep is None else layer[keep].float() for layer in logits])
    return pooled.logsumexp(-1).square().mean()
