"""Normalisation layers, by name."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import LayerNorm

__all__ = ["NORMS", "LayerNorm", "RMSNorm", "make_norm"]


class RMSNorm(nn.Module):
    """Scale by the root mean square over the last dimensions (Zhang and Sennrich 2019).

    `shape` is a width, or several for one mean over several dimensions. Statistics are in fp32.
    """

    def __init__(self, shape: int | tuple[int, ...], eps: float = 1e-6) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        dims = tuple(range(-len(self.shape), 0))
        # The length needs one pass over x where the mean of squares needs two.
        length = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
        scale = torch.rsqrt(length.square() / self.weight.numel() + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.shape}, eps={self.eps}"


NORMS = {
    "layer": LayerNorm,
    "layer_without_bias": partial(LayerNorm, bias=False),
    "rms": RMSNorm,
}


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """A norm of `NORMS` over the last dimension."""
    if kind not in NORMS:
        raise ValueError(f"norm is {kind!r}; use one of {', '.join(NORMS)}")
    return NORMS[kind](width, eps=eps)
