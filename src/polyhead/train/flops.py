"""FLOPs of a causal language model, counted from its parts; a model on the meta device will do.

A multiplication and an addition are two. Counted are the products of matrices: of the layers, the
head, a recurrence's gates, the routers and of experts those a token visits, and attention's two.
Not counted: lookups, norms, softmax, activations, the loss, the optimizer. `T` tokens of a text.
"""

from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel, require_causal
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.moe import MixtureOfExperts


def training_flops(model: TaskModel, context: int) -> float:
    """Forward and backward FLOPs a token, in texts of `context` tokens: three times the forward's.

    6 N + 6 H D T for each layer of attention, as a query sees T / 2 keys on average, or fewer
    where it has a window (Kaplan et al. 2020, section 2.1). Gradients take two products for each
    of the forward. ConfigError for a model that is not causal, or a context below 1.
    """
    require_causal(model)
    if context < 1:
        raise ConfigError(f"context is {context}; it must be 1 or more")
    layers = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    windows: Any = getattr(model.config, "windows", None) or [None] * len(layers)
    seen = [mean_keys(context, window) for window in windows]
    return 3 * (2 * product_weights(model) + attention_flops(layers, seen))


def attention_flops(layers: list[MultiHeadAttention], seen: list[float]) -> float:
    """Forward FLOPs a query of scores and of weighted values, where layers see so many keys."""
    return sum(
        4 * keys * layer.num_heads * layer.head_dim
        for layer, keys in zip(layers, seen, strict=False)
    )


def mean_keys(context: int, window: int | None = None) -> float:
    """Keys that a query of a causal layer sees on average, positions taken as continuous."""
    width = context if window is None else min(window, context)
    return width - width**2 / (2 * context)


def product_weights(model: nn.Module) -> int:
    """Weights that a token is multiplied with; of experts, those of the `top_k` it visits."""
    weights = 0.0
    for part in model.modules():
        if isinstance(part, nn.Linear):
            weights += part.weight.numel()
        elif isinstance(part, nn.LSTM):
            named = part.named_parameters()
            weights += sum(value.numel() for name, value in named if name.startswith("weight"))
        elif isinstance(part, MixtureOfExperts):
            share = part.top_k / part.num_experts
            weights += share * sum(value.numel() for value in part.experts.parameters())
    return round(weights)
