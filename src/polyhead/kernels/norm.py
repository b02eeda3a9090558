"""LayerNorm and RMSNorm by a kernel of our own, for inference and training.

On a CPU torch 2.13's LayerNorm takes up to twice as long in inference; RMSNorm, which it does in
several passes, up to six times as long with its gradient.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyhead.kernels.native import TYPES, address, learns, library, takes
from polyhead.nn.norm import LayerNorm, RMSNorm


class FusedLayerNorm(LayerNorm):
    """`LayerNorm` by the kernel; what that does not take is left to torch."""

    def forward(self, input: Tensor) -> Tensor:
        if not _takes(input, self.weight, self.bias, self.normalized_shape):
            return super().forward(input)
        by = _Norm.apply if learns(input, self.weight, self.bias) else _normed
        return by("layer", input, self.weight, self.bias, self.eps)


class FusedRMSNorm(RMSNorm):
    """`RMSNorm` by the kernel; what that does not take is left to torch."""

    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight, None, self.shape):
            return super().forward(x)
        by = _Norm.apply if learns(x, self.weight) else _normed
        return by("rms", x, self.weight, None, self.eps)


def _takes(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> bool:
    return (
        weight is not None
        and shape == (x.shape[-1],)
        and x.shape[-1] % 16 == 0
        and takes(x, weight, bias)
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())
        and library("norm") is not None
    )


class _Norm(torch.autograd.Function):
    """`layer` or `rms`: a norm over the last dimension, times a weight, plus a bias if any."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.name, ctx.eps = name, eps
        return _normed(name, x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        of_x = torch.empty_like(x)
        sums = x.new_zeros(torch.get_num_threads(), 2, x.shape[-1], dtype=torch.float32)
        name = f"{ctx.name}_back_{TYPES[x.dtype]}"
        _call(name, (x, weight, grad.contiguous(), of_x, sums), ctx.eps)
        of_weight, of_bias = sums.sum(0).to(weight.dtype)
        return None, of_x, of_weight, None if bias is None else of_bias, None


def _normed(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _call(f"{name}_{TYPES[x.dtype]}", (x, weight, bias, y), eps)
    return y


def _call(name: str, tensors: tuple[Tensor | None, ...], eps: float) -> None:
    """The kernel's function over the rows of the first tensor."""
    x = next(x for x in tensors if x is not None)
    width = x.shape[-1]
    getattr(library("norm"), name)(
        *map(address, tensors), ctypes.c_int64(x.numel() // width), ctypes.c_int64(width),
        ctypes.c_float(eps), ctypes.c_int32(torch.get_num_threads()),
    )  # fmt: skip


DOUBLES: dict[type[nn.Module], type[nn.Module]] = {
    LayerNorm: FusedLayerNorm,
    RMSNorm: FusedRMSNorm,
}
"""What takes the place of which norm."""
