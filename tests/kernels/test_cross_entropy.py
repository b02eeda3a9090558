"""Cross-entropy by the kernel equals torch's in double precision, and leaves the gradient."""

import pytest
import torch
import torch.nn.functional as F

from polyhead.kernels import cross_entropy
from polyhead.kernels.native import library
from polyhead.kernels.norm import FusedLayerNorm
from polyhead.train.objectives import _ChunkedCrossEntropy

SIZES = [(7, 16), (9, 65), (3, 5), (1, 1), (0, 20), (4, 50257), (300, 33)]


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_and_gradient(
    size: tuple[int, int],
    smoothing: float,
    dtype: torch.dtype,
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "library", lambda name: library(name, machine))
    logits = (torch.randn(size) * 5).to(dtype)
    labels = torch.randint(size[1], size[:1])
    labels[1::3] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(expected, exact)
    plain = F.cross_entropy(exact, labels, reduction="sum")

    kept = logits.clone()
    looked = cross_entropy.cross_entropy_(logits, labels, smoothing, differentiates=False)
    assert torch.equal(logits, kept)
    found = cross_entropy.cross_entropy_(logits, labels, smoothing, differentiates=True)
    assert found is not None
    assert looked is not None
    nll, even = found
    assert torch.equal(torch.stack(looked), torch.stack(found))
    assert nll.item() == pytest.approx(plain.item(), rel=1e-5)
    assert nll + smoothing * (even - nll) == pytest.approx(expected.item(), rel=1e-5)
    tolerance = 4e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.double(), gradient, atol=tolerance, rtol=tolerance)


def test_logits_of_any_size() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 1.0], [float("nan"), 0.0, 1.0]])
    labels = torch.tensor([0, 2, 1])
    expected = F.cross_entropy(logits[:2], labels[:2], reduction="sum")
    found = cross_entropy.cross_entropy_(logits[:2].clone(), labels[:2], 0.0, differentiates=True)
    assert found is not None
    torch.testing.assert_close(found[0], expected)
    found = cross_entropy.cross_entropy_(logits, labels, 0.0, differentiates=True)
    assert found is not None
    assert found[0].isnan()
    assert logits[2].isnan().all()


def test_what_is_no_label_is_left_to_torch() -> None:
    logits, labels = torch.randn(4, 7), torch.tensor([0, 6, 7, 1])
    assert cross_entropy.cross_entropy_(logits, labels, 0.0, differentiates=True) is None
    assert cross_entropy.cross_entropy_(logits, labels[:2].int(), 0.0, differentiates=True) is None
    head = torch.nn.Linear(8, 7)
    with pytest.raises(IndexError, match="label 7 is out of bounds: there are 7 classes"):
        _ChunkedCrossEntropy.apply(torch.randn(4, 8), head.weight, head.bias, labels, 0.0, 2)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_type_is_nothing_to_it(kind: torch.dtype) -> None:
    logits, labels = torch.randn(9, 40), torch.randint(40, (9,))
    norm = FusedLayerNorm(64)
    x = torch.randn(50, 64)
    usual = torch.autograd.grad(norm(x).square().sum(), norm.weight)[0]
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.set_default_dtype(kind)
    try:
        found = cross_entropy.cross_entropy_(logits, labels, 0.0, differentiates=True)
        again = torch.autograd.grad(norm(x).square().sum(), norm.weight)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(usual, again)
