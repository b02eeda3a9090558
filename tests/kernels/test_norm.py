"""The norm's kernel equals LayerNorm in double precision, and leaves to torch what it must."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from polyhead.kernels import norm
from polyhead.kernels.native import library
from polyhead.kernels.norm import PackedNorm


def layer(width: int, dtype: torch.dtype, bias: bool = True, eps: float = 1e-5) -> nn.LayerNorm:
    made = nn.LayerNorm(width, eps, bias=bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter).requires_grad_(False)
    return made.to(dtype)


def check(plain: nn.LayerNorm, x: Tensor) -> None:
    found, usual = PackedNorm.of(plain)(x), plain(x)
    bias = None if plain.bias is None else plain.bias.double()
    true = F.layer_norm(x.double(), plain.normalized_shape, plain.weight.double(), bias, plain.eps)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    if x.dtype == torch.bfloat16 and x.numel():
        assert (found.double() - true).norm() <= 1.2 * (usual.double() - true).norm()
    else:
        assert_close(found.double(), true, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 96), (16,), (0, 32), (200, 384), (7, 20)], ids=str)
def test_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "library", lambda name: library(name, machine))
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    check(layer(shape[-1], dtype), x)
    check(layer(shape[-1], dtype, bias=False, eps=0.5), x)


def test_strides_and_far_means() -> None:
    check(layer(48, torch.float32), torch.randn(48, 9).T)
    plain, x = layer(48, torch.float32), torch.randn(9, 48) + 300
    # A mean of 300 is itself rounded to 2e-5; variance by the mean of squares would be off by 1e-2.
    assert_close(PackedNorm.of(plain)(x), plain(x), atol=2e-4, rtol=0.0)


def test_gradients_are_torch_s() -> None:
    plain = layer(32, torch.float32).requires_grad_()
    x = torch.randn(4, 32, requires_grad=True)
    leaves = [x, plain.weight, plain.bias]
    grads = [
        torch.autograd.grad(one(x).square().sum(), leaves) for one in (plain, PackedNorm.of(plain))
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
