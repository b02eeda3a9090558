"""The kernel equals attention in double precision, wherever it takes over and where it does not."""

import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from tests.nn.parts import MASKS, B, H, T
from torch import Tensor
from torch.testing import assert_close

from polyhead.kernels import attend as kernel
from polyhead.kernels.native import library
from polyhead.nn import attend as plain
from polyhead.nn.mask import EVERYTHING, Lowered, Mask

HALF, SINGLE = torch.bfloat16, torch.float32
dtypes = pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
SIZES = [  # B, H, G, Q, K, D
    (5, 3, 3, 49, 49, 32), (2, 6, 6, 197, 197, 64), (3, 4, 2, 7, 9, 16), (2, 4, 1, 41, 64, 48),
    (1, 2, 2, 40, 1, 32), (1, 1, 1, 5, 17, 128), (2, 3, 3, 4, 130, 80), (1, 2, 2, 6, 2048, 32),
    (2, 2, 2, 1, 12, 32), (2, 2, 2, 9, 9, 24), (1, 1, 1, 4, 2049, 16), (0, 2, 2, 8, 8, 16),
]  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the kernel's `attend` that follows left the work to torch."""
    calls: list[bool] = []

    def counted(*args: object) -> Tensor:
        calls.append(True)
        return plain.attend(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(kernel, "plain", type("Plain", (), {"attend": staticmethod(counted)}))
    return calls


def true(
    q: Tensor, k: Tensor, v: Tensor, mask: Lowered, bias: Tensor | None, scale: float
) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    sharing = q.shape[1] // max(k.shape[1], 1)
    scores = q @ k.repeat_interleave(sharing, 1).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    allowed = mask.boolean(q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(sharing, 1)


def drawn(
    size: tuple[int, ...], dtype: torch.dtype, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as projections make them: views of `[B, T, H * D]`, or of one tensor for all three."""
    rows, heads, groups, queries, keys, d = size
    if fused:
        whole = torch.randn(rows, queries, 3 * heads * d).to(dtype).chunk(3, -1)
        q, k, v = (x.view(rows, queries, heads, d).transpose(1, 2) for x in whole)
        return q, k, v
    shapes = [(queries, heads), (keys, groups), (keys, groups)]
    q, k, v = (torch.randn(rows, n, h, d).to(dtype).transpose(1, 2) for n, h in shapes)
    return q, k, v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lowered = EVERYTHING,
    bias: Tensor | None = None,
    scale: float = 0.2,
) -> None:
    before = [x.clone() for x in (q, k, v)]
    with torch.no_grad():
        found = kernel.attend(q, k, v, mask, bias, scale)
        torchs = plain.attend(q, k, v, mask, bias, scale)
    expected = true(q, k, v, mask, None if bias is None else bias.to(q.dtype), scale)
    assert found.shape == q.shape
    assert found.dtype == q.dtype
    if q.dtype == SINGLE:
        assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    elif q.numel():
        wrong, usual = ((x.double() - expected).norm() for x in (found, torchs))
        assert wrong <= 1.2 * usual + 1e-6
    assert all(torch.equal(one, other) for one, other in zip(before, (q, k, v), strict=True))


def test_it_is_compiled_where_there_is_a_compiler() -> None:
    assert (library("attend") is not None) == bool(sys.platform == "linux" and shutil.which("g++"))


@dtypes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*drawn(size, dtype))


@dtypes
@pytest.mark.parametrize("shape", ["1H", "B1", "BH", "1H-strided", "B1-same-for-all-queries"])
def test_biases(shape: str, dtype: torch.dtype) -> None:
    rows, heads, _, queries, keys, _ = size = (3, 4, 2, 43, 37, 32)
    lead = {"1H": (1, heads), "B1": (rows, 1), "BH": (rows, heads)}[shape[:2]]
    bias = torch.randn(*lead, queries, keys).to(dtype)
    if "strided" in shape:
        bias = torch.randn(*lead, keys, queries).transpose(2, 3)
    if "same" in shape:
        bias = bias[:, :, :1]
    check(*drawn(size, dtype), bias=bias)
    check(*drawn(size, dtype), bias=bias.masked_fill(bias > 1, float("-inf")))


@dtypes
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, biased: bool, dtype: torch.dtype) -> None:
    q, k, v = drawn((B, H, 2, T, T, 32), dtype, fused=False)
    bias = torch.randn(1, H, T, T) if biased else None
    check(q, k, v, MASKS[name].lower(T, T, q.device), bias)


@dtypes
def test_long_masks_and_one_projection_for_all_three(dtype: torch.dtype) -> None:
    keep = torch.arange(70) < torch.tensor([[70], [0], [33], [16], [1]])
    check(
        *drawn((5, 2, 2, 70, 70, 32), dtype, fused=True), Mask(keep=keep).lower(70, 70, keep.device)
    )


@dtypes
def test_layouts_that_a_pair_does_not_fit(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 8, 33).to(dtype)[..., :32] for _ in range(3))
    check(q, k, v)
    q, k, v = (torch.randn(2, 3, 32, 8).to(dtype).transpose(2, 3) for _ in range(3))
    check(q, k, v)


@dtypes
@pytest.mark.parametrize("factor", [0.0, 1e-30, 10.0, 1e4])
def test_scores_of_any_size(factor: float, dtype: torch.dtype) -> None:
    q, k, v = drawn((2, 2, 2, 9, 30, 32), dtype)
    check(q * factor, k, v)


@dtypes
def test_what_is_not_a_number_shows(dtype: torch.dtype) -> None:
    q, k, v = drawn((1, 1, 1, 6, 20, 16), dtype)
    # Any of them, not only the usual one.
    q[0, 0, 2, 3] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        found = kernel.attend(q, k, v)
    assert found.isnan().all(-1).flatten().tolist() == [row == 2 for row in range(6)]


@dtypes
def test_what_is_not_a_number_shows_behind_what_is_hidden(dtype: torch.dtype) -> None:
    q, k, v = drawn((1, 1, 1, 32, 32, 16), dtype)
    q[0, 0, 0] = float("nan")
    causal = Mask(causal=True).lower(32, 32, q.device)
    hidden = Mask(keep=torch.arange(32)[None] < 8).lower(32, 32, q.device)
    for mask in (causal, hidden):
        found = kernel.attend(q, k, v, mask)
        assert found.isnan().all(-1).flatten().tolist() == [True] + [False] * 31


@dtypes
def test_what_is_kept_elsewhere_may_lie_otherwise(dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in drawn((2, 4, 2, 9, 9, 32), dtype)]
    mask = Mask(keep=torch.rand(2, 9) > 0.3).lower(9, 9, leaves[0].device)
    found = []
    for pack in (lambda x: x, lambda x: x.contiguous()):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, pack):
            out = kernel.attend(*leaves, mask, None, 0.3)
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@dtypes
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    q, k, v = drawn((5, 3, 3, 49, 49, 32), dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with torch.no_grad():
                found.append(kernel.attend(q, k, v, scale=0.2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@dtypes
@pytest.mark.parametrize("size", SIZES[:6], ids=str)
def test_without_the_machine_s_own_instructions(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for any machine of the kind, bf16 is widened and rounded by hand."""
    monkeypatch.setattr(kernel, "library", lambda name: library(name, "-mtune=generic"))
    q, k, v = drawn(size, dtype)
    check(q, k, v, bias=torch.randn(1, size[1], *size[3:5]))
    keep = torch.rand(size[0], size[4]) > 0.3
    check(q, k, v, Mask(keep=keep).lower(size[3], size[4], q.device))


def test_without_a_compiler_it_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda name: None)
    q, k, v = drawn(SIZES[0], SINGLE)
    assert torch.equal(kernel.attend(q, k, v), plain.attend(q, k, v))


Attend = Callable[[Tensor, Tensor, Tensor, Lowered, None, float], Tensor]


def grads(attend: Attend, leaves: list[Tensor], mask: Lowered, above: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = attend(*leaves, mask, None, 0.3)  # pyright: ignore[reportCallIssue]
    return list(torch.autograd.grad(out, leaves, above.to(out.dtype)))


def check_gradients(leaves: list[Tensor], mask: Lowered = EVERYTHING) -> None:
    above = torch.randn_like(leaves[0]).transpose(1, 2).contiguous().transpose(1, 2)
    found = grads(kernel.attend, leaves, mask, above)
    usual = grads(plain.attend, leaves, mask, above)
    expected = grads(true, [x.double() for x in leaves], mask, above)
    least = float(above.norm())
    for one, torchs, right in zip(found, usual, expected, strict=True):
        assert one.shape == right.shape
        wrong, tolerated = (one.double() - right).norm(), (torchs.double() - right).norm()
        if one.dtype == SINGLE:
            assert wrong <= 2e-6 * right.norm() + 1e-6 * least
        else:
            assert wrong <= 1.3 * tolerated + 2e-3 * right.norm() + 1e-4 * least


@dtypes
@pytest.mark.parametrize("size", SIZES[:9], ids=str)
def test_gradients_at_any_size(size: tuple[int, ...], dtype: torch.dtype) -> None:
    check_gradients(list(drawn(size, dtype)))


@dtypes
@pytest.mark.parametrize("name", MASKS)
def test_gradients_with_masks(name: str, dtype: torch.dtype) -> None:
    leaves = list(drawn((B, H, 2, T, T, 32), dtype))
    check_gradients(leaves, MASKS[name].lower(T, T, leaves[0].device))


@dtypes
@pytest.mark.parametrize("length", [16, 59, 60, 61, 121, 190])
def test_causal_gradients_across_chunks(length: int, dtype: torch.dtype) -> None:
    leaves = list(drawn((2, 4, 2, length, length, 48), dtype))
    check_gradients(leaves, Mask(causal=True).lower(length, length, leaves[0].device))


@dtypes
def test_gradients_without_the_machine_s_own_instructions(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "library", lambda name: library(name, "-mtune=generic"))
    check_gradients(list(drawn(SIZES[0], dtype)))
    leaves = list(drawn((2, 4, 2, 61, 61, 32), dtype))
    check_gradients(leaves, Mask(causal=True).lower(61, 61, leaves[0].device))


def test_a_bias_that_learns_and_dropout_are_left_to_torch(taken: list[bool]) -> None:
    leaves = [x.requires_grad_() for x in drawn((2, 2, 2, 8, 8, 16), SINGLE)]
    bias = torch.randn(1, 2, 8, 8, requires_grad=True)
    found, usual = (
        torch.autograd.grad(attend(*leaves, EVERYTHING, bias).square().sum(), bias)
        for attend in (kernel.attend, plain.attend)
    )
    assert torch.equal(found[0], usual[0])
    assert taken == [True]
    with torch.no_grad():
        assert kernel.attend(*leaves, dropout=1.0).eq(0).all()
    assert len(taken) == 2


def test_what_it_takes_is_not_left_to_torch(taken: list[bool]) -> None:
    with torch.no_grad():
        for dtype in (SINGLE, HALF):
            kernel.attend(*drawn(SIZES[0], dtype))
    assert len(taken) == (0 if library("attend") else 2)
