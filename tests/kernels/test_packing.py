"""A packed model answers, saves and shows what the model that it was made of does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.parts import randomized
from torch import Tensor, nn
from torch.testing import assert_close

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.kernels import PackedLinear, pack
from polyhead.kernels.attend import FusedAttention
from polyhead.kernels.norm import FusedRMSNorm
from polyhead.kernels.packing import MANY, ManyTokensHead
from polyhead.kernels.rotate import FusedRotary
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from polyhead.nn.head import LanguageHead
from polyhead.nn.norm import RMSNorm
from polyhead.nn.rotary import Rotary

TEXT: dict[str, Any] = dict(
    vocab_size=50, d_model=32, d_ff=48, num_layers=2, num_heads=2, init_std=0.3
)
IMAGE: dict[str, Any] = dict(image_size=32, patch_size=4, d_model=32, init_std=0.3)
SWIN: dict[str, Any] = dict(
    IMAGE, patch_size=2, depths=(2, 2), num_heads=(2, 4), window=5, activation="gelu_tanh"
)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", TEXT),
    "gpt2": ("gpt2", {key: TEXT[key] for key in TEXT if key != "d_ff"}),
    "llama": ("llama", dict(TEXT, num_heads=4, num_kv_heads=2)),
    "vit": ("vit", dict(IMAGE, d_ff=48, num_layers=2, num_heads=2)),
    "swin": ("swin", SWIN),
    "swin-head-of-8": ("swin", dict(SWIN, d_model=16)),
}
families = pytest.mark.parametrize("name", FAMILIES)


def made(name: str) -> TaskModel:
    family, fields = FAMILIES[name]
    return ph.build(family, seed=0, **fields).eval()


def inputs(model: TaskModel, rows: int = 3) -> dict[str, Tensor]:
    if getattr(model.config, "kind", "decoder") == "vision":
        return {"pixel_values": torch.randn(rows, 3, 32, 32).to(model.dtype)}
    mask = torch.arange(13) < torch.tensor([[13], [4], [9]]).repeat(rows // 3, 1)
    return {"input_ids": torch.randint(5, 50, (rows, 13)), "attention_mask": mask}


@families
def test_answers_are_equal_to_rounding(name: str) -> None:
    model = made(name)
    given = inputs(model)
    packed = pack(model)
    assert any(isinstance(part, PackedLinear) for part in packed.modules())
    expected = model(**given)
    found = packed(**given)
    assert expected.abs().max() > 0.1
    assert not found.requires_grad
    if "attention_mask" in given:
        found, expected = found[given["attention_mask"]], expected[given["attention_mask"]]
    assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0.0)


@families
def test_half_precision_stays_as_near(name: str) -> None:
    model = made(name)
    given = inputs(model, rows=48)
    true = model(**given)
    half = model.bfloat16()
    given = {k: x.bfloat16() if x.is_floating_point() else x for k, x in given.items()}
    usual, found = ((one(**given).float() - true).norm() for one in (half, pack(half)))
    assert found <= 1.2 * usual


@families
def test_the_old_model_stays_and_shares_what_is_not_packed(name: str) -> None:
    model = made(name)
    parts = [type(part) for part in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    packed = pack(model)
    packed(**inputs(model))
    assert [type(part) for part in model.modules()] == parts
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    theirs = {value.data_ptr() for value in model.parameters()}
    for key, value in packed.named_parameters():
        assert value.is_mkldnn or value.data_ptr() in theirs, key
    assert packed.num_parameters() == model.num_parameters()


@families
def test_it_saves_the_weights_as_they_were(name: str, tmp_path: Path) -> None:
    model = made(name)
    packed = pack(pack(model))
    state = model.state_dict()
    assert list(packed.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in packed.state_dict().items())
    packed.save(tmp_path)
    back = ph.load(tmp_path).state_dict()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@families
def test_it_loads_other_weights(name: str) -> None:
    packed, other = pack(made(name)), randomized(made(name), 0.1)
    packed.load_state_dict(other.state_dict())
    given = inputs(other)
    kept = given.get("attention_mask", ...)
    assert_close(packed(**given)[kept], other(**given)[kept], atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        packed.load_state_dict({**other.state_dict(), _first_packed(packed): torch.zeros(2, 2)})
    state = other.state_dict()
    del state[_first_packed(packed)]
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict(state)


def _first_packed(model: nn.Module) -> str:
    return next(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, PackedLinear))


def test_it_is_neither_cast_nor_moved() -> None:
    packed = pack(made("bert"))
    packed.to("cpu", torch.float32)
    with pytest.raises(ConfigError, match=r"stays on the CPU in float32.*then pack it"):
        packed.bfloat16()
    with pytest.raises(ConfigError, match="stays on the CPU"):
        packed.to("meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(
    activation: str, kind: type[FeedForward | GatedFeedForward], dtype: torch.dtype
) -> None:
    exact = randomized(kind(24, 56, activation, bias=True), 0.5)
    x = torch.randn(2, 7, 24)
    true = exact.double()(x.double()).float()
    plain = exact.to(dtype)
    usual, found = ((one(x.to(dtype)).float() - true).norm() for one in (plain, pack(plain)))
    assert found <= 1.2 * usual + 1e-6 * true.norm()


def test_a_linear_layer_alone() -> None:
    for bias in (True, False):
        linear = nn.Linear(5, 3, bias=bias)
        packed = pack(nn.Sequential(linear))
        for shape in ((5,), (0, 5), (1, 5), (4, 5), (2, 3, 5)):
            x = torch.randn(shape)
            assert_close(packed(x), linear(x))
        x = torch.randn(5, 4).T
        assert_close(packed(x), linear(x))
        with pytest.raises(RuntimeError):
            packed(torch.randn(2, 4))


def test_double_precision_stays_as_it_is() -> None:
    model = made("vit").double()
    given = {key: value.double() for key, value in inputs(model).items()}
    assert torch.equal(pack(model)(**given), model(**given))


def test_maps_are_captured_as_ever() -> None:
    model = made("vit")
    given = inputs(model)
    packed = pack(model)
    with ph.capture(model) as expected:
        model(**given)
    with ph.capture(packed) as found:
        packed(**given)
    assert list(found) == list(expected)
    for key, seen in found.items():
        assert_close(seen, expected[key], atol=1e-5, rtol=0.0)


def test_a_tied_head_stays_tied() -> None:
    packed = pack(made("gpt2"))
    assert packed.head.weight is packed.backbone.embedding.weight


def test_parts_without_products_take_their_kernels() -> None:
    kinds = {type(part) for part in pack(made("llama")).modules()}
    assert {FusedAttention, FusedRMSNorm, FusedRotary, ManyTokensHead} <= kinds
    assert not {MultiHeadAttention, RMSNorm, Rotary, LanguageHead} & kinds


@pytest.mark.parametrize("tokens", [MANY - 1, MANY])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_head_of_many_tokens(tokens: int, scale: float) -> None:
    head = LanguageHead(24, 50, bias=True, scale=scale)
    x = torch.randn(1, tokens, 24)
    found = pack(nn.Sequential(head))
    assert type(found[0]) is ManyTokensHead
    assert_close(found(x), head(x).detach(), atol=1e-5, rtol=1e-5)
