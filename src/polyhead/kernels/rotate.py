"""Rotary positions by a kernel of our own: one pass over queries or keys where torch takes five."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polyhead.kernels.native import TYPES, address, learns, library, takes
from polyhead.nn.position import Position
from polyhead.nn.rotary import Rotary, Rotation


class _Turn(ctypes.Structure):
    """`Turn` of rotate.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "batch heads tokens d".split()),
        *((name, ctypes.c_int64 * 3) for name in "x out".split()),
        ("angles", ctypes.c_int64 * 2),
        ("back", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class FusedRotary(Rotary):
    """`Rotary` that turns by the kernel."""

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        cos, sin = self.angles(at)
        return FusedRotation(cos.to(dtype), sin.to(dtype))


class FusedRotation(Rotation):
    """`Rotation` by the kernel; what that does not take is left to torch."""

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        is_even = x.shape[-1] % 32 == 0 and x.stride(-1) == 1
        fits = is_even and self.cos.shape[1:] == (1, *x.shape[2:])
        fits = fits and len(self.cos) in (1, len(x)) and self.cos.shape == self.sin.shape
        if fits and takes(x, self.cos, self.sin) and library("rotate"):
            if learns(x):
                return _Turned.apply(x, self.cos, self.sin)
            return _turn(x, self.cos, self.sin, back=False)
        return super().rotate(x, at)


class _Turned(torch.autograd.Function):
    """x `[B, H, T, D]` turned by angles `[B|1, 1, T, D]`; what comes out is contiguous."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return _turn(grad, *ctx.saved_tensors, back=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    # The projections, before which gradients arrive, have tokens before heads.
    B, H, T, D = x.shape
    out = x.new_empty(B, T, H, D).transpose(1, 2) if back else x.new_empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    angles = (cos.stride(0) if len(cos) > 1 else 0, cos.stride(2))
    of_x, of_out = ((ctypes.c_int64 * 3)(*y.stride()[:3]) for y in (x, out))
    turn = _Turn(
        B, H, T, D, of_x, of_out, (ctypes.c_int64 * 2)(*angles), back, torch.get_num_threads()
    )
    function = getattr(library("rotate"), f"rotate_{TYPES[x.dtype]}")
    function(ctypes.byref(turn), *map(address, (x, cos, sin, out)))
    return out


DOUBLES: dict[type[nn.Module], type[nn.Module]] = {Rotary: FusedRotary}
"""What takes the place of which position."""
