"""The norms' kernels equal LayerNorm and RMSNorm in double precision, gradients too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

from polyhead.kernels import norm
from polyhead.kernels.native import library
from polyhead.kernels.norm import FusedLayerNorm, FusedRMSNorm
from polyhead.nn import norm as norms


def layer(width: int, dtype: torch.dtype, bias: bool = True, eps: float = 1e-5) -> nn.LayerNorm:
    made = nn.LayerNorm(width, eps, bias=bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter).requires_grad_(False)
    return made.to(dtype)


def fused(plain: nn.LayerNorm) -> FusedLayerNorm:
    made = copy.deepcopy(plain)
    made.__class__ = FusedLayerNorm
    assert isinstance(made, FusedLayerNorm)
    return made


def check(plain: nn.LayerNorm, x: Tensor) -> None:
    found, usual = fused(plain)(x), plain(x)
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
    assert_close(fused(plain)(x), plain(x), atol=2e-4, rtol=0.0)


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 96), (16,), (0, 32), (500, 48), (7, 20)], ids=str)
@pytest.mark.parametrize("kind", ["layer", "layer_without_bias", "rms"])
def test_gradients(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(norm, "library", lambda name: library(name, machine))
    plain = norms.make_norm(kind, shape[-1], 1e-3).to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    x, above = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exact = copy.deepcopy(plain).double()
    fused = copy.deepcopy(plain)
    fused.__class__ = norm.DOUBLES[type(plain)]
    answers = [gradients(one, x.to(kind), above) for one, kind in
               ((fused, dtype), (plain, dtype), (exact, torch.float64))]  # fmt: skip
    for found, usual, true in zip(*answers, strict=True):
        wrong, tolerated = (found.double() - true).norm(), (usual.double() - true).norm()
        assert found.dtype == dtype
        assert wrong <= 1.2 * tolerated + 1e-5 * true.norm()


def gradients(layer: nn.Module, x: Tensor, above: Tensor) -> list[Tensor]:
    """The answer, and what it does to the input and the weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    leaves = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, above.to(y.dtype))]


def test_transformed_tensors_are_left_to_torch() -> None:
    """Under vmap and with derivatives forwards, a tensor's memory is not what it stands for."""
    fast, plain = FusedRMSNorm(32).requires_grad_(False), norms.RMSNorm(32).requires_grad_(False)
    x, along = torch.randn(3, 4, 32), torch.randn(3, 4, 32)
    assert_close(torch.func.vmap(fast)(x), plain(x))
    for one, other in zip(*(torch.func.jvp(f, (x,), (along,)) for f in (fast, plain)), strict=True):
        assert_close(one, other)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, along)
        found, expected = (forward_ad.unpack_dual(f(dual)).tangent for f in (fast, plain))
    assert_close(found, expected)
