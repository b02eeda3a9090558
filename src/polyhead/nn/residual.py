"""What stands between a part of a block and the residual that it adds to."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """A learned factor for each channel, small at first (Touvron et al. 2021b): `[..., E]`."""

    def __init__(self, d_model: int, value: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((d_model,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class DropPath(nn.Module):
    """Leave a part out, row by row, while training (Huang et al. 2016, stochastic depth).

    What stays is scaled up, so that the mean is the same.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"{self.rate}"
