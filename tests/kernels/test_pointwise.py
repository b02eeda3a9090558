"""Activations and gates by the kernel equal those in double precision, gradients too."""

import pytest
import torch
from torch import Tensor

from polyhead.kernels import pointwise
from polyhead.kernels.native import library
from polyhead.nn.feedforward import ACTIVATIONS

KERNELS = [name for name, each in ACTIVATIONS.items() if each in pointwise._NAMES]


def answers(name: str, x: Tensor, gate: Tensor | None, above: Tensor, exact: bool) -> list[Tensor]:
    """The product of activation and gate, and its gradients."""
    leaves = [y.clone().requires_grad_() for y in (x, gate) if y is not None]
    if exact:
        y = ACTIVATIONS[name](leaves[0])
        y = y if gate is None else y * leaves[1]
    else:
        y = pointwise.gated(ACTIVATIONS[name], leaves[0], None if gate is None else leaves[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, above.to(y.dtype))]


def check(name: str, x: Tensor, gate: Tensor | None) -> None:
    above = torch.randn(x.shape).to(x.dtype)
    found = answers(name, x, gate, above, exact=False)
    usual = answers(name, x, gate, above, exact=True)
    wide = None if gate is None else gate.double()
    true = answers(name, x.double(), wide, above.double(), exact=True)
    for one, torchs, right in zip(found, usual, true, strict=True):
        assert one.dtype == x.dtype
        wrong, tolerated = ((each.double() - right).norm() for each in (one, torchs))
        assert wrong <= 1.1 * tolerated + 3e-7 * (right.norm() + right.numel() ** 0.5)


def test_the_usual_activations_have_one() -> None:
    assert set(KERNELS) == {"silu", "gelu", "gelu_tanh"}


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients(
    name: str, gated: bool, dtype: torch.dtype, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "library", lambda name: library(name, machine))
    x = (torch.randn(37, 48) * 3).to(dtype)
    check(name, x, torch.randn(37, 48).to(dtype) if gated else None)
    check(name, x.T, torch.randn(37, 48).to(dtype).T if gated else None)
    check(name, x[:, :9], torch.randn(37, 9).to(dtype) if gated else None)  # no whole lanes


@pytest.mark.parametrize("name", KERNELS)
def test_far_from_zero(name: str) -> None:
    x = torch.tensor([-1e30, -300.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 300.0, 1e9, 5.0]
                     + [0.0] * 4)  # fmt: skip
    found = pointwise.gated(ACTIVATIONS[name], x, None)
    torch.testing.assert_close(found, ACTIVATIONS[name](x), atol=1e-6, rtol=1e-6)
    x[3] = float("nan")
    assert pointwise.gated(ACTIVATIONS[name], x, None).isnan().nonzero().flatten().tolist() == [3]
