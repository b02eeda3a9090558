"""Rotation by the kernel equals `Rotary`, gradients too."""

import copy

import pytest
import torch
from torch import Tensor

from polyhead.kernels import rotate
from polyhead.kernels.native import library
from polyhead.nn.rotary import Rotary


def turned(position: Rotary, x: Tensor, at: Tensor, above: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = position.prepare(at, at, x.dtype).rotate(x, at)
    return [y.detach(), *torch.autograd.grad(y, [x], above.to(y.dtype))]


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["alike", "ragged"])
@pytest.mark.parametrize("width", [32, 64, 96, 24])
def test_it_turns_as_rotary_does(
    width: int, rows: str, dtype: torch.dtype, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "library", lambda name: library(name, machine))
    plain = Rotary(width)
    fused = copy.copy(plain)
    fused.__class__ = rotate.FusedRotary
    at = torch.arange(11)[None] + (torch.tensor([[0], [7], [300]]) if rows == "ragged" else 5)
    above = torch.randn(3, 4, 11, width).to(dtype)
    for x in (torch.randn(3, 11, 4, width).transpose(1, 2), torch.randn(3, 4, 11, width)):
        found, usual = (turned(one, x.to(dtype), at, above) for one in (fused, plain))
        true = turned(plain, x.to(dtype).double(), at, above)
        for one, torchs, right in zip(found, usual, true, strict=True):
            wrong, tolerated = ((each.double() - right).norm() for each in (one, torchs))
            assert wrong <= 1.1 * tolerated + 1e-7 * right.norm()


def test_the_gradient_is_that_of_any_angles() -> None:
    cos, sin = torch.randn(2, 1, 1, 5, 32).unbind(0)
    x, above = torch.randn(2, 2, 3, 5, 32).unbind(0)
    found = torch.autograd.functional.vjp(
        lambda y: rotate.FusedRotation(cos, sin).rotate(y, y), x, above
    )
    usual = torch.autograd.functional.vjp(
        lambda y: super(rotate.FusedRotation, rotate.FusedRotation(cos, sin)).rotate(y, y), x, above
    )
    for one, other in zip(found, usual, strict=True):
        torch.testing.assert_close(one, other)
