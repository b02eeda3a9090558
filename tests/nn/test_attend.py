"""The fused path equals the definition, for every mask, position and grouping of heads."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from tests.nn.parts import DEVICE, MASKS, POSITIONS, B, D, E, H, T, randomized
from torch import Tensor, nn
from torch.testing import assert_close

from polyhead.nn import attend as attending
from polyhead.nn.attend import attend, expand_heads, weights
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mask import EVERYTHING, Mask
from polyhead.nn.probe import Probe

CLOSE = dict(atol=1e-5, rtol=0.0)
masks = pytest.mark.parametrize("mask", MASKS)
groupings = pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])


def by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One query at a time, over the keys it may see and no others; float64."""
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    y = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.shape[1] // k.shape[1])
        keys = seen[b, h, i].nonzero().flatten()
        if len(keys):
            scores = k[b, group, keys] @ q[b, h, i] * scale + bias[b, h, i, keys]
            y[b, h, i] = scores.softmax(0) @ v[b, group, keys]
    return y.float()


@masks
@groupings
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_both_equal_one_query_at_a_time(mask: str, groups: int, biased: bool) -> None:
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, groups, T, D), torch.randn(B, groups, T, D)
    bias = torch.randn(1, H, T, T) if biased else None
    lowered = MASKS[mask].lower(T, T, q.device)
    seen = MASKS[mask].dense(T, T, q.device).expand(B, H, T, T)
    whole = (torch.zeros(1, H, T, T) if bias is None else bias).expand(B, H, T, T)
    expected = by_hand(q, k, v, seen, whole, 0.3)
    explicit = weights(q, k, lowered, bias, 0.3) @ expand_heads(v, H)
    assert_close(explicit, expected, **CLOSE)
    assert_close(attend(q, k, v, lowered, bias, 0.3), expected, **CLOSE)


@masks
@pytest.mark.parametrize(
    ("position", "groups"),
    [(name, 2) for name in POSITIONS] + [(name, g) for name in ("none", "alibi") for g in (1, 4)],
)
def test_fused_equals_explicit_and_so_do_gradients(mask: str, position: str, groups: int) -> None:
    """Through the layer: a probe that returns nothing makes it take the explicit path."""
    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=groups), 0.2)
    part = POSITIONS[position]()
    x = torch.randn(B, T, E)
    answers: list[tuple[Tensor, list[Tensor]]] = []
    leaves = [*layer.parameters(), *(part.parameters() if part is not None else [])]
    for probes in ([], [Probe()]):
        layer.probes = probes
        inputs = x.clone().requires_grad_()
        y = layer(inputs, mask=MASKS[mask], position=part)
        gradients = torch.autograd.grad(y.square().sum(), [inputs, *leaves], allow_unused=True)
        answers.append((y.detach(), [g for g in gradients if g is not None]))
    (fused, fused_gradients), (explicit, explicit_gradients) = answers
    assert fused.isfinite().all()
    assert_close(fused, explicit, **CLOSE)
    # Gradients sum over everything, so their size sets the measure (a key's bias has none at all).
    measure = max(1.0, *(gradient.abs().max().item() for gradient in explicit_gradients))
    for one, other in zip(fused_gradients, explicit_gradients, strict=True):
        assert one.isfinite().all()
        assert_close(one, other, atol=1e-6 * measure, rtol=0.0)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(3, 10), (1, 7), (33, 65)], ids=str)
def test_a_query_that_sees_nothing_gets_zeros(
    biased: bool, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    num_queries, num_keys = size
    shapes = [(2, 2, num_queries, D), (2, 2, num_keys, D), (2, 2, num_keys, D)]
    bias = torch.randn(1, 2, num_queries, num_keys) if biased else None
    keep = torch.zeros(2, num_keys, dtype=torch.bool)
    keep[1, :2] = True
    mask = Mask(keep=keep).lower(num_queries, num_keys, DEVICE)
    for path in (attend, lambda q, k, v, m, b, s: weights(q, k, m, b, s) @ v):
        leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        y = path(*leaves, mask, bias, 0.5)
        assert y[0].eq(0).all()
        assert y[1].ne(0).any()
        for gradient in torch.autograd.grad(y.float().sum(), leaves):
            assert gradient.isfinite().all()
            assert gradient[0].eq(0).all()


def test_weights_are_shares() -> None:
    q, k = torch.randn(2, 4, 5, D), torch.randn(2, 2, 7, D)
    for mask in (EVERYTHING, Mask(window=3).lower(5, 7, q.device)):
        shares = weights(q, k, mask)
        assert shares.shape == (2, 4, 5, 7)
        assert_close(shares.sum(-1), torch.ones(2, 4, 5))


def test_a_layer_s_bias_may_ask_for_a_gradient_and_a_row_of_its_own() -> None:
    q, k, v = torch.randn(3, B, H, T, D).unbind()
    bias = torch.randn(B, 1, T, T, requires_grad=True)
    mask = Mask(causal=True).lower(T, T, q.device)
    (one,) = torch.autograd.grad(attend(q, k, v, mask, bias).sum(), bias)
    (other,) = torch.autograd.grad((weights(q, k, mask, bias) @ v).sum(), bias)
    assert_close(one, other, **CLOSE)


def test_half_precision_stays_near() -> None:
    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=2), 0.2)
    x = torch.randn(B, T, E)
    for name, make in POSITIONS.items():
        part = make()
        exact = layer(x, mask=MASKS["keep"], position=part)
        half = nn.ModuleList([layer, *([part] if part is not None else [])]).bfloat16()
        rough = layer(x.bfloat16(), mask=MASKS["keep"], position=part)
        assert rough.dtype == torch.bfloat16, name
        assert_close(rough.float(), exact, atol=0.1, rtol=0.05)
        half.float()


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize("at_once", [1, 2**21], ids=["row-by-row", "together"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", ["everything", "causal", "keep"])
def test_half_precision_training_is_as_exact_as_the_fused_kernel(
    groups: int, at_once: int, biased: bool, name: str
) -> None:
    length = 24
    shapes = [(B, H, length, D), *[(B, groups, length, D)] * 2]
    shapes += [(1, H, length, length)] * biased
    exact = [torch.randn(shape, requires_grad=True) for shape in shapes]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    fused = [x.detach().bfloat16().requires_grad_() for x in exact]
    masks = {
        "everything": Mask(),
        "causal": Mask(causal=True),
        "keep": Mask(keep=torch.arange(length) < torch.arange(length, length - B, -1)[:, None]),
    }
    mask = masks[name].lower(length, length, DEVICE)
    upstream = torch.randn(B, H, length, D)
    with patch.object(attending, "_AT_ONCE", at_once):
        mine = attend(*half[:3], mask, *half[3:] or [None], scale=D**-0.5)
    y = attend(*exact[:3], mask, *exact[3:] or [None], scale=D**-0.5)
    with patch.object(attending, "_trains_half_on_cpu", lambda q: False):
        theirs = attend(*fused[:3], mask, *fused[3:] or [None], scale=D**-0.5)
    for found in (y, mine, theirs):
        found.backward(upstream.to(found.dtype))
    for ours, sdpa, true in zip((mine, *half), (theirs, *fused), (y, *exact), strict=True):
        if true is not y:
            ours, sdpa, true = ours.grad, sdpa.grad, true.grad
        wrong, reference = ((x.float() - true).abs().max() for x in (ours, sdpa))
        assert wrong <= 2 * reference + 1e-2


def test_dropped_shares_keep_the_mean_in_half_precision_training() -> None:
    q, k, v = (torch.randn(2, 2, 16, D).bfloat16().requires_grad_() for _ in range(3))
    whole = attend(q, k, v)
    many = torch.stack([attend(q, k, v, dropout=0.3).detach().float() for _ in range(2000)])
    assert many.std(0).min() > 0.01
    assert_close(many.mean(0), whole.float(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [1.0, 6.0, 10.0])
def test_large_biases_lose_no_more_than_in_the_definition(size: float) -> None:
    """A sum of a score and a bias of some size has too few bits in bfloat16."""
    torch.manual_seed(0)
    shapes = [(2, H, 24, D)] * 3 + [(1, H, 24, 24)]
    exact = [torch.randn(shape) * (size**0.5 if i < 2 else 1) for i, shape in enumerate(shapes)]
    exact[3] *= size
    exact = [x.bfloat16().float().requires_grad_() for x in exact]
    upstream = torch.randn(2, H, 24, D)

    def gradient(parts: list[Tensor], how: Callable[..., Tensor]) -> Tensor:
        how(*parts).backward(upstream.to(parts[0].dtype))
        return parts[0].grad.float()

    def written(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, bias=bias, scale=D**-0.5)

    def defined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return weights(q, k, bias=bias, scale=D**-0.5) @ v

    def halves() -> list[Tensor]:
        return [x.detach().bfloat16().requires_grad_() for x in exact]

    true = gradient(exact, defined)
    wrong, reference = (
        (gradient(halves(), how) - true).norm() / true.norm() for how in (written, defined)
    )
    assert wrong <= 1.2 * reference


def test_half_precision_training_takes_what_the_fused_kernel_takes() -> None:
    q, k, v = (torch.randn(2, H, 5, D).bfloat16().requires_grad_() for _ in range(3))
    whole = attend(q, k, v, bias=torch.zeros(1, H, 5, 5))
    assert whole.dtype == torch.bfloat16
    assert_close(whole, attend(q, k, v), atol=2e-2, rtol=2e-2)
    assert attend(q[:0], k[:0], v[:0]).shape == (0, H, 5, D)
    assert attend(q[:, :, :0], k, v).shape == (2, H, 0, D)
