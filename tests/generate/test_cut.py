"""Rows cut without being sorted, beside sorting them."""

import pytest
import torch
from torch import Tensor

from polyhead.generate.sampling import filters
from polyhead.generate.sampling.cut import cut, cut_sorted

INF = float("inf")
VOCAB = 6000
P = (0.9, 0.3, 1.0, 1e-8, 0.99999, 0.95)


def logits_of(kind: str, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(len(P), VOCAB, generator=made)
    match kind:
        case "normal":
            return x * 2
        case "flat":
            return x * 1e-3
        case "equal":
            return x * 0
        case "ties":
            return (x * 2).round()
        case "bf16":
            return x.bfloat16().float()
        case "peaked":
            return x * 25
        case "spike":
            return x.index_fill(1, torch.tensor([77]), 200.0)
        case "removed":
            return x.masked_fill(torch.rand(x.shape, generator=made) < 0.9, -INF)
        case "alone":
            return torch.full_like(x, -INF).index_fill(1, torch.tensor([5]), 1.0)
        case "near":
            return x * 1e-6 + 30
    raise AssertionError(kind)


KINDS = [
    "normal", "flat", "equal", "ties", "bf16", "peaked", "spike", "removed", "alone", "near",
]  # fmt: skip


def plain_top_p(logits: Tensor, p: Tensor) -> Tensor:
    descending, order = logits.sort(dim=1, descending=True, stable=True)
    likely = (descending - filters.whole(logits)).exp()
    before = likely.cumsum(1) - likely
    remove = (before > p[:, None] - 5e-7) & (p < 1)[:, None]
    remove[:, 0] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter_(1, order, remove), -INF)


def plain_typical(logits: Tensor, mass: Tensor) -> Tensor:
    logprobs = logits.log_softmax(1)
    entropy = -(logprobs * logprobs.exp()).nansum(1, keepdim=True)
    shift, order = (-logprobs - entropy).abs().sort(dim=1)
    reached = logits.softmax(1).double().gather(1, order).cumsum(1)
    last = (reached < mass[:, None]).sum(1, keepdim=True).clamp(max=VOCAB - 1)
    remove = (-logprobs - entropy).abs() > shift.gather(1, last)
    return logits.masked_fill(remove & (mass < 1)[:, None], -INF)


def plain_top_k(logits: Tensor, k: Tensor) -> Tensor:
    pairs = zip(logits.sort(dim=1, descending=True).values, k.tolist(), strict=True)
    rows = [row[min(k, VOCAB) - 1] for row, k in pairs]
    return logits.masked_fill((logits < torch.stack(rows)[:, None]) & (k > 0)[:, None], -INF)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fast", "plain", "values"),
    [
        (filters.keep_top_p, plain_top_p, P),
        (filters.keep_typical, plain_typical, P),
        (filters.keep_top_k, plain_top_k, (0, 1, 50, 3000, 5999, 6001)),
    ],
    ids=["top-p", "typical", "top-k"],
)
def test_filters_keep_what_sorting_keeps(kind, fast, plain, values):
    values = torch.tensor(values)
    for seed in range(3):
        logits = logits_of(kind, seed)
        kept = fast(logits, values)
        assert torch.equal(kept.softmax(1), plain(logits, values).softmax(1))
        for row in range(len(P)):  # whatever else is in the batch
            alone = fast(logits[row : row + 1], values[row : row + 1])
            assert torch.equal(alone[0], kept[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_cut_where_sorting_cuts_it(kind):
    scores = logits_of(kind)
    weights = torch.rand(scores.shape, dtype=torch.float64)
    limit = torch.tensor([1e-9, 0.5, 30.0, 1500.0, 2700.0, 1e9], dtype=torch.float64)[:, None]
    for fast, plain in zip(
        cut(scores, weights, limit), cut_sorted(scores, weights, limit), strict=True
    ):
        assert torch.equal(fast, plain)


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_what_is_no_number_spoils_no_other_row(poison):
    logits = logits_of("normal")
    values = torch.full((len(P),), 0.9)
    expected = filters.keep_top_p(logits, values)
    logits[2, 40] = poison
    got = filters.keep_top_p(logits, values)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(got[others], expected[others])
    filters.keep_typical(logits, values)
    filters.keep_top_k(logits, values.long() + 3000)
