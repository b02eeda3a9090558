"""Queries, keys and values of few bits are one product, and what that gives is what each gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from polyhead.kernels import pack
from polyhead.kernels.attend import FusedAttention
from polyhead.kernels.native import library
from polyhead.models.model import TaskModel

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
