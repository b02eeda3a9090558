"""Weights of a model that starts fresh."""

import math

import torch
from torch import nn

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.embedding import Table
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import Experts


@torch.no_grad()
def initialize(model: nn.Module, num_layers: int, std: float = 0.02) -> None:
    """Normal with `std`, biases zero; what adds to the residual, std / sqrt(2 layers).

    (Radford et al. 2019, section 2.3.) Norms stay as made. A module that has an `initialize` of
    its own begins by that, as T5 does, whose scores are not scaled.
    """
    residual = std / math.sqrt(2 * num_layers)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(module.bias)
        elif isinstance(module, Table):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate, std=std)
            nn.init.normal_(module.up, std=std)
    # After the walk above, which meets these layers too.
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            nn.init.normal_(module.out.weight, std=residual)
        elif isinstance(module, FeedForward | GatedFeedForward):
            nn.init.normal_(module.down.weight, std=residual)
        elif isinstance(module, Experts):
            nn.init.normal_(module.down, std=residual)
    for module in model.modules():
        own = getattr(module, "initialize", None)
        if callable(own):
            own()
