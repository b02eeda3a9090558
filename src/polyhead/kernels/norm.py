"""LayerNorm by a kernel of our own: torch 2.13's takes up to twice as long on a CPU."""

import ctypes

import torch
from torch import Tensor

from polyhead.kernels.native import library
from polyhead.nn.norm import LayerNorm

_NAMES = {torch.float32: "norm_float32", torch.bfloat16: "norm_bfloat16"}


class PackedNorm(LayerNorm):
    """`LayerNorm` for inference; what the kernel does not take is left to torch."""

    @classmethod
    def of(cls, layer: LayerNorm) -> "PackedNorm":
        """The same layer, its weights included."""
        packed = cls.__new__(cls)
        packed.__dict__ = layer.__dict__
        return packed

    def forward(self, input: Tensor) -> Tensor:
        kernel = library("norm")
        if kernel is None or not self._takes(input):
            return super().forward(input)
        x = input.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        pointers = (
            ctypes.c_void_p(None if t is None else t.data_ptr())
            for t in (x, self.weight, self.bias, y)
        )
        getattr(kernel, _NAMES[x.dtype])(
            *pointers, ctypes.c_int64(x.numel() // width), ctypes.c_int64(width),
            ctypes.c_float(self.eps), ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return y

    def _takes(self, x: Tensor) -> bool:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return (
            x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.dtype in _NAMES
            and self.normalized_shape == (x.shape[-1],)
            and x.shape[-1] % 16 == 0
            and not (learns or torch.compiler.is_compiling())
        )
