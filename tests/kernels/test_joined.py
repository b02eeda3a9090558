"""Products of few bits that are made together give what each gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from polyhead.compress.formats import Int4, Int8, Int8Rows
from polyhead.kernels import pack
from polyhead.kernels.attend import FusedAttention
from polyhead.kernels.native import library
from polyhead.kernels.packing import LaidOutFeedForward
from polyhead.kernels.products import LaidOut
from polyhead.models.model import TaskModel
from polyhead.nn.feedforward import ACTIVATIONS

pytestmark = pytest.mark.skipif(library("products") is None, reason="no compiler is here")

SIZES: dict[str, Any] = dict(
    vocab_size=50, d_model=64, d_ff=96, num_layers=2, num_heads=4, init_std=0.3
)
IDS = torch.randint(5, 50, (3, 13), generator=torch.Generator().manual_seed(0))


def packed(family: str, form: str = "int8-rows", **fields: Any) -> TaskModel:
    model = ph.build(family, seed=0, **SIZES, **fields).eval()
    return pack(ph.quantize(model, form))


def apart(model: TaskModel) -> Tensor:
    """The answer of each layer by itself."""
    joined = [part.joined for part in attentions(model)]
    for part in attentions(model):
        part.joined = None
    found = answer(model)
    for part, own in zip(attentions(model), joined, strict=True):
        part.joined = own
    return found


def feed_forwards(model: nn.Module) -> list[LaidOutFeedForward]:
    return [part for part in model.modules() if isinstance(part, LaidOutFeedForward)]


def attentions(model: nn.Module) -> list[FusedAttention]:
    return [part for part in model.modules() if isinstance(part, FusedAttention)]


@torch.inference_mode()
def answer(model: TaskModel, **given: Tensor) -> Tensor:
    return model(IDS, **given)


@pytest.mark.parametrize("form", ["int4", "int8", "int8-rows"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("gpt2", {}),
        ("llama", {"num_kv_heads": 1}),
        ("qwen3", {"num_kv_heads": 2, "head_dim": 16}),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_answers_are_those_of_each(family: str, fields: dict[str, Any], form: str) -> None:
    sizes = {key: value for key, value in SIZES.items() if (family, key) != ("gpt2", "d_ff")}
    model = pack(ph.quantize(ph.build(family, seed=0, **sizes, **fields).eval(), form))
    joined = attentions(model)
    assert joined
    assert all(part.joined is not None for part in joined)
    assert torch.equal(answer(model), apart(model))


def test_layers_stay_what_they_were() -> None:
    model = ph.quantize(ph.build("bert", seed=0, **SIZES).eval(), "int4")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = pack(model).state_dict()
    assert list(before) == list(after)
    for key, value in after.items():
        assert torch.equal(value, before[key]), key


def test_weights_are_held_once() -> None:
    part = attentions(packed("bert"))[0]
    assert part.joined is not None
    q, k, v = (layer.packed.data for layer in (part.q, part.k, part.v))
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v, part.joined.whole.data)}
    assert len(storages) == 1
    assert q.numel() + k.numel() + v.numel() == part.joined.whole.data.numel()


def test_rows_that_end_within_a_block_stay_apart() -> None:
    model = packed("llama", num_kv_heads=1, head_dim=24)  # 24 keys
    assert all(part.joined is None for part in attentions(model))
    assert answer(model).isfinite().all()


def test_a_watched_layer_is_seen_and_heeded() -> None:
    model = packed("bert")
    plain = answer(model)
    seen: list[Tensor] = []
    layer = attentions(model)[0].v
    hook = layer.register_forward_hook(lambda *call: seen.append(call[2]))
    assert torch.equal(answer(model), plain)
    assert [tuple(x.shape) for x in seen] == [(3, 13, 64)]
    hook.remove()
    hook = layer.register_forward_hook(lambda *call: torch.zeros_like(call[2]))
    assert not torch.equal(answer(model), plain)
    hook.remove()
    assert torch.equal(answer(model), plain)


def test_an_adapter_counts() -> None:
    model = packed("llama")
    plain = answer(model)
    ph.add_adapter(model, ph.LoraConfig(rank=2, targets=("q", "v")))
    for name, parameter in model.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    adapted = answer(model)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    assert torch.equal(adapted, apart(model))


def test_a_bias_of_one_layer_is_still_its_own() -> None:
    model = packed("bert")
    with torch.no_grad():
        attentions(model)[0].k.bias.add_(0.5)
        attentions(model)[0].v.bias.add_(0.5)
    assert torch.equal(answer(model), apart(model))
    attentions(model)[0].v.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
    assert torch.equal(answer(model), apart(model))


@pytest.mark.parametrize("form", [Int4, Int8, Int8Rows])
@pytest.mark.parametrize("sizes", [(64, 96, 64), (40, 100, 33), (52, 33, 17), (8, 5, 3)])
@pytest.mark.parametrize("tokens", [1, 3, 18, 64, 71])
def test_two_products_at_once(form: Any, sizes: tuple[int, int, int], tokens: int) -> None:
    given, inner, rows = sizes
    torch.manual_seed(tokens)
    up = LaidOut.of(form(torch.randn(inner, given) * given**-0.5))
    down = LaidOut.of(form(torch.randn(rows, inner) * inner**-0.5))
    assert up is not None
    assert down is not None
    x, biases = torch.randn(tokens, given), (torch.randn(inner), torch.randn(rows))
    for name in ("relu", "gelu", "gelu_tanh", "silu"):
        activation = ACTIVATIONS[name]
        for first, second in (biases, (None, None)):
            middle = up.times(x, bias=first, activation=activation)
            assert middle is not None
            found = up.then_times(x, down, (first, second), activation)
            assert torch.equal(found, down.times(middle, bias=second))
    half = up.then_times(x.bfloat16(), down, (None, None), None)
    exact = up.then_times(x.bfloat16().float(), down, (None, None), None)
    assert torch.allclose(half.float(), exact, rtol=2**-8, atol=1e-6)


def test_two_products_of_unlike_matrices_are_not_one() -> None:
    up, down = LaidOut.of(Int4(torch.randn(64, 32))), LaidOut.of(Int8(torch.randn(32, 64)))
    assert up is not None
    assert down is not None
    assert up.then_times(torch.randn(2, 32), down, (None, None), None) is None


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("form", ["int4", "int8", "int8-rows"])
def test_a_feed_forward_layer_is_one_call(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {key: SIZES[key] for key in SIZES if family == "bert" or key != "d_ff"}
    given: dict[str, Any] = {"input_ids": IDS}
    if family == "vit":
        sizes = dict(d_model=64, d_ff=96, num_layers=2, num_heads=4, image_size=32, patch_size=8)
        given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = pack(ph.quantize(ph.build(family, seed=0, **sizes).eval(), form))
    calls: list[Tensor | None] = []
    kernel = LaidOut.then_times

    def noted(*args: Any) -> Tensor | None:
        calls.append(kernel(*args))
        return calls[-1]

    monkeypatch.setattr(LaidOut, "then_times", noted)
    with torch.inference_mode():
        found = model(**given)
        assert len(calls) == len(feed_forwards(model)) == 2
        assert all(call is not None for call in calls)
        monkeypatch.setattr(LaidOut, "then_times", lambda *args: None)
        assert torch.equal(model(**given), found)


def test_a_watched_feed_forward_layer_goes_layer_by_layer() -> None:
    model = packed("bert")
    plain = answer(model)
    seen: list[Tensor] = []
    layer = feed_forwards(model)[1]
    for part in (layer.up, layer.down):
        hook = part.register_forward_hook(lambda *call: seen.append(call[2]))
        assert torch.equal(answer(model), plain)
        hook.remove()
    assert [tuple(x.shape) for x in seen] == [(3, 13, 96), (3, 13, 64)]
