"""Products with few bits are those of what unpacks, by activations rounded as is said."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polyhead as ph
from polyhead.compress.formats import Int4, Int8, Int8Rows, Nf4, PackedWeight
from polyhead.compress.steps import rounded_inputs
from polyhead.kernels import products
from polyhead.kernels.native import library
from polyhead.kernels.products import LaidOut

pytestmark = pytest.mark.skipif(library("products") is None, reason="nothing compiles it here")

SHAPES = [
    (1, 1, 1),
    (64, 64, 1),
    (100, 96, 3),
    (33, 70, 9),
    (192, 576, 17),
    (16, 31, 2),
    (40, 8, 0),
]
forms = pytest.mark.parametrize("form", [Int4, Int8, Int8Rows])


def weights(form: type[PackedWeight], rows: int, width: int) -> tuple[PackedWeight, LaidOut]:
    torch.manual_seed(rows)
    weight = form(torch.randn(rows, width) * torch.rand(rows, 1))
    found = LaidOut.of(weight)
    assert found is not None
    return weight, found


def times(weight: LaidOut, x: Tensor, rows: slice = slice(None)) -> Tensor:
    found = weight.times(x, rows)
    assert found is not None
    return found


@forms
@pytest.mark.parametrize("machine", ["-march=native", "-mtune=generic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "tokens"), SHAPES)
def test_a_product_is_the_rounded_activations_by_what_unpacks(
    rows: int, width: int, tokens: int, dtype: torch.dtype, machine: str, form: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(products, "library", lambda name: library(name, machine))
    weight, laid_out = weights(form, rows, width)
    x = (torch.randn(2, tokens, width) * 10 ** torch.randn(2, tokens, 1)).to(dtype)
    found = times(laid_out, x)
    assert (found.shape, found.dtype) == ((2, tokens, rows), dtype)
    true = rounded_inputs(x, form).double() @ weight.unpack().double().T
    size = rounded_inputs(x, form).double().abs() @ weight.unpack().double().abs().T
    step = 1e-6 if dtype == torch.float32 else 2**-8
    assert ((found - true).abs() <= step * size.clamp(min=1e-9) + 1e-12).all()
    # What rounding costs: of 127 steps, half a one at most.
    most = x.float().abs().amax(-1, keepdim=True)
    assert ((rounded_inputs(x, form) - x.float()).abs() <= most / 250).all()


@pytest.mark.parametrize("machine", ["-march=native", "-march=haswell", "-mtune=generic"])
@pytest.mark.parametrize("form", [Int8, Int8Rows])
def test_activations_rounded_twice_lose_next_to_nothing(
    form: Any, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "library", lambda name: library(name, machine))
    for rows, width, tokens in SHAPES:
        weight, _ = weights(form, rows, width)
        laid_out = LaidOut.of(weight, rounds_twice=True)
        assert laid_out is not None
        x = torch.randn(tokens, width) * 10 ** torch.randn(tokens, 1)
        true = x.double() @ weight.unpack().double().T
        size = x.double().abs() @ weight.unpack().double().abs().T
        assert ((times(laid_out, x) - true).abs() <= 1e-4 * size).all()


def test_a_head_in_eight_bits_rounds_twice_unless_others_have_four() -> None:
    model = ph.build("llama", seed=0, **MODELS["llama"])
    ids = torch.arange(12)[None]
    for form, twice in (("int8", True), ("int8-rows", True), ("int4", False)):
        packed = ph.pack(ph.quantize(model, form))
        table: Any = packed.backbone.embedding
        assert table.packed.rounds_twice is twice
        hidden = packed.backbone(ids)
        exact = hidden @ table.weight.T
        lost = (packed.head(hidden) - exact).abs().max() / exact.abs().max()
        assert (lost.item() < 1e-4) is twice


@forms
def test_it_unpacks_as_before(form: Any) -> None:
    weight, laid_out = weights(form, 75, 70)
    rows = torch.tensor([3, 74, 0, 3, 17])
    for some in (slice(None), slice(5, 40), slice(16, 75), rows):
        assert torch.equal(laid_out.unpack(some), weight.unpack(some))
    assert laid_out.num_bytes() <= 1.1 * form(torch.randn(80, 96)).num_bytes()


@forms
@pytest.mark.parametrize("row", [75, 80, -1])
def test_a_row_that_is_not_there(form: Any, row: int) -> None:
    _, laid_out = weights(form, 75, 70)
    assert laid_out.unpack(torch.tensor([74])).shape == (1, 70)
    with pytest.raises(IndexError):
        laid_out.unpack(torch.tensor([3, row]))


@forms
def test_some_rows(form: Any) -> None:
    _, laid_out = weights(form, 75, 70)
    x = torch.randn(3, 70)
    assert torch.equal(times(laid_out, x, slice(16, 41)), times(laid_out, x)[:, 16:41])
    assert laid_out.times(x, slice(5, 41)) is None  # a block is read whole
    assert laid_out.times(x.double()) is None


@forms
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 33, 69])
def test_what_is_no_number_shows(form: Any, bad: float, place: int) -> None:
    _, laid_out = weights(form, 20, 70)
    x = torch.randn(2, 70)
    x[1, place] = bad
    found = times(laid_out, x)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


@forms
def test_a_token_is_the_same_in_any_company(form: Any) -> None:
    _, laid_out = weights(form, 96, 128)
    x = torch.randn(37, 128)
    together = times(laid_out, x)
    for token in (0, 7, 8, 36):
        assert torch.equal(times(laid_out, x[token : token + 1])[0], together[token])


SIZES: dict[str, Any] = dict(vocab_size=70, d_model=64, num_layers=2, num_heads=4)
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(SIZES, d_ff=96, num_kv_heads=2, tie_embeddings=True),
    "gpt2": SIZES,
    "mixtral": dict(SIZES, d_ff=48, num_experts=4, top_k=2),
    "bert": dict(SIZES, d_ff=96),
    "t5": dict(SIZES, d_ff=96),
}


@pytest.mark.parametrize("form", ["int4", "int8", "int8-rows"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_answers_as_the_quantized_one(name: str, form: str, tmp_path: Any) -> None:
    model = ph.quantize(ph.build(name, seed=0, **MODELS[name]).eval(), form)
    packed = ph.pack(model)
    assert sum(isinstance(part, LaidOut) for part in packed.modules()) > 8
    assert not any(isinstance(part, LaidOut) for part in model.modules())
    ids = torch.randint(70, (3, 11))
    given = (ids, ids[:, :5]) if name == "t5" else (ids,)
    with torch.inference_mode():
        found, expected = packed(*given), model(*given)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.02 * expected.norm()
    # What it saves is what the weights are.
    for key, value in model.state_dict().items():
        assert torch.equal(packed.state_dict()[key], value)


def test_what_has_no_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LaidOut.of(Nf4(torch.randn(4, 64))) is None
    monkeypatch.setattr(products, "library", lambda name: None)
    assert LaidOut.of(Int4(torch.randn(4, 64))) is None
    model = ph.quantize(ph.build("llama", seed=0, **MODELS["llama"]).eval(), "int4")
    ids = torch.randint(70, (2, 9))
    assert_close(ph.pack(model)(ids), model(ids))
