"""The likeliest few by the kernel are torch's, with their log-probabilities."""

import pytest
import torch

from polyhead.kernels import best as module
from polyhead.kernels.best import best
from polyhead.kernels.native import library


@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize(
    "size", [(32, 8192, 8), (3, 5, 5), (1, 17, 3), (2, 4099, 64), (0, 20, 4)], ids=str
)
def test_the_likeliest(
    size: tuple[int, int, int], machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "library", lambda name: library(name, machine))
    rows, width, count = size
    logits = torch.randn(rows, width) * 5
    logits[:1] += 1e4  # exponentials of these alone would be none
    expected = logits.double().log_softmax(1).topk(count, dim=1)
    values, tokens = best(logits, count)
    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(values.double(), expected.values, atol=1e-5, rtol=1e-5)


def test_where_few_can_follow_tokens_differ() -> None:
    logits = torch.full((1, 40), float("-inf"))
    logits[0, [7, 30]] = torch.tensor([0.0, 1.0])
    values, tokens = best(logits, 6)
    assert tokens[0, :2].tolist() == [30, 7]
    assert len(set(tokens[0].tolist())) == 6
    assert values[0, 2:].tolist() == [float("-inf")] * 4


def test_what_the_kernel_does_not_take() -> None:
    logits = torch.randn(8, 30)
    by_kernel = best(logits, 4)
    for given in (logits.T.contiguous().T, logits.double()):
        torch.testing.assert_close(best(given, 4), by_kernel)
