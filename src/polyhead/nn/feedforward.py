"""The position-wise feed-forward layers and their activations."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def relu_squared(x: Tensor) -> Tensor:
    """ReLU² (So et al. 2021, Primer)."""
    return F.relu(x).square()


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, which CLIP was trained with (Hendrycks and Gimpel 2016, section 2)."""
    return x * (1.702 * x).sigmoid()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by a tangent, as GPT-2 has it (Hendrycks and Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "relu2": relu_squared,
    "quick_gelu": quick_gelu,
    "tanh": F.tanh,
}


def activation_named(name: str) -> Activation:
    """An activation of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, `[..., E]` to `[..., E]` (Vaswani et al. 2017, section 3.3)."""

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`: SwiGLU with silu, GeGLU with gelu (Shazeer 2020)."""

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))
