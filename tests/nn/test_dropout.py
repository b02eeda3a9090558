import pytest
import torch
from torch import nn

from polyhead.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_part_is_zero_and_the_rest_grows(rate: float, dtype: torch.dtype) -> None:
    x = torch.full((301, 333), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, rate)
    gone = y == 0
    # Five standard deviations of the share of 100,000 coins.
    assert gone.float().mean().item() == pytest.approx(
        rate, abs=5 * (rate * (1 - rate) / 1e5) ** 0.5
    )
    torch.testing.assert_close(y[~gone].float().mean().item(), 2 / (1 - rate), rtol=5e-3, atol=0)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, gone)


def test_draws_do_not_depend_on_each_other() -> None:
    """Four share one number of the generator: neighbours, and the four places of one."""
    gone = (dropout(torch.ones(400_000), 0.25) == 0).float() - 0.25
    for step in (1, 2, 3, 4, 5):
        assert (gone[step:] * gone[:-step]).mean().abs() < 5 * 0.1875 / 400_000**0.5
    for place in range(4):
        assert gone[place::4].mean().abs() < 5 * (0.1875 / 100_000) ** 0.5


def test_the_ends_and_the_odd() -> None:
    x = torch.randn(3, 5)
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))
    assert dropout(x[:, :0], 0.5).shape == (3, 0)
    assert dropout(torch.randn(7, 2).T, 0.5).shape == (2, 7)


def test_a_seed_decides() -> None:
    layer = Dropout(0.5)
    assert isinstance(layer, nn.Dropout)
    x, found = torch.randn(40), []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(layer(x))
    assert torch.equal(*found)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("rate", [1e-6, 1e-9, 5e-6])
def test_a_rate_that_rounds_to_nothing_drops_nothing(rate):
    assert torch.equal(dropout(torch.ones(1001), rate), torch.ones(1001))
