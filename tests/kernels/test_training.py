"""A model that trains by kernels learns what the plain one does, and is the plain one after."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.kernels import attend, norm, pointwise, rotate
from polyhead.kernels.training import fused
from polyhead.models.model import TaskModel
from polyhead.nn.norm import RMSNorm

TEXT: dict[str, Any] = dict(vocab_size=50, d_model=64, num_layers=2, num_heads=2, init_std=0.3)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", TEXT),
    "llama": ("llama", dict(TEXT, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=32)),
    "odd-llama": ("llama", dict(TEXT, d_ff=50, d_model=60, head_dim=30)),
    "qwen3": ("qwen3", dict(TEXT, d_ff=48, num_kv_heads=1, head_dim=32)),
    "mixtral": ("mixtral", dict(TEXT, d_ff=48, num_kv_heads=1, num_experts=4)),
    "bert": ("bert", dict(TEXT, d_ff=48)),
    "deberta": ("deberta-v2", dict(TEXT, d_ff=48)),
    "t5": ("t5", dict(vocab_size=50, d_model=64, d_ff=48, num_layers=2, num_heads=2)),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are for Linux")


def made(name: str, dtype: torch.dtype, seed: int = 0) -> TaskModel:
    family, fields = FAMILIES[name]
    return ph.build(family, seed=seed, **fields).to(dtype).eval()


def learned(model: TaskModel) -> dict[str, Tensor]:
    """A loss and the gradients of all weights."""
    torch.manual_seed(0)
    ids = torch.randint(5, 50, (3, 21))
    mask = torch.arange(21) < torch.tensor([[21], [9], [16]])
    more = {"decoder_input_ids": ids[:, :8]} if model.config.model_type == "t5" else {}
    logits = model(ids, attention_mask=mask, **more).float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), ids[:, : logits.shape[1]].flatten()
    )
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    size = sum(float(y.square().sum()) for y in other.values()) ** 0.5
    return sum(float((one[n] - other[n]).square().sum()) for n in other) ** 0.5 / size


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_equal_to_rounding(name: str) -> None:
    model = made(name, torch.float32)
    usual = learned(model)
    with fused(model):
        assert distance(learned(model), usual) < 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_bfloat16_are_no_worse(name: str) -> None:
    ours = usual = 0.0
    for seed in range(6):
        model = made(name, torch.bfloat16, seed)
        exact = learned(made(name, torch.bfloat16, seed).float())
        usual += distance(learned(model), exact)
        with fused(model):
            ours += distance(learned(model), exact)
    assert ours < 1.3 * usual


@linux
@pytest.mark.parametrize(
    ("name", "called"),
    [("llama", {attend, norm, pointwise, rotate}), ("gpt2", {attend, norm, pointwise}),
     ("mixtral", {attend, norm, pointwise, rotate})],
)  # fmt: skip
def test_the_kernels_do_the_work(
    name: str, called: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[Any] = set()

    def counted(module: Any) -> Callable[[str], Any]:
        plain = module.library

        def library(kind: str) -> Any:
            seen.add(module)
            return plain(kind)

        return library

    for module in (attend, norm, pointwise, rotate):
        monkeypatch.setattr(module, "library", counted(module))
    model = made(name, torch.bfloat16)
    with fused(model):
        learned(model)
    assert seen == called


def test_afterwards_the_model_is_as_it_was() -> None:
    model = made("llama", torch.float32)
    kinds = [type(part) for part in model.modules()]
    names = list(model.state_dict())
    with fused(model):
        assert list(model.state_dict()) == names
        assert not any(type(part) is RMSNorm for part in model.modules())
    assert [type(part) for part in model.modules()] == kinds
