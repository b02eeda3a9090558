"""Adapters change what they should, and nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.adapt.adapters import (
    adapters_of,
    add_adapter,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
    use_adapters,
)
from polyhead.adapt.lora import LoraConfig
from polyhead.adapt.peft import load_adapter, save_adapter
from polyhead.models.model import TaskModel
from polyhead.nn.sharing import with_same_weights

IDS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))


def made(family: str = "llama", **fields: object) -> TaskModel:
    sizes = dict(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2)
    return ph.build(family, seed=0, **{**sizes, **fields}).eval()


def learned(model: TaskModel, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def answer(model: TaskModel) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing_and_alone_learns(dora: bool) -> None:
    model = made()
    plain, names = answer(model), {name for name, _ in model.named_parameters()}
    add_adapter(model, LoraConfig(rank=2, dora=dora, dropout=0.5))
    torch.testing.assert_close(answer(model), plain)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert learning.isdisjoint(names)
    assert names <= {name for name, _ in model.named_parameters()}
    learned(model)
    model.train()(IDS).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has_gradient == (name in learning), name


def test_in_training_what_a_reads_is_dropped() -> None:
    model = made()
    add_adapter(model, LoraConfig(dropout=0.5))
    learned(model)
    assert torch.equal(answer(model), answer(model))
    model.train()
    assert not torch.equal(answer(model), answer(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    model = made().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapter(model, LoraConfig(rank=4, targets="all-linear"))
    learned(model)
    wanted = answer(model)
    merge_adapters(model)
    merge_adapters(model)  # merged once, whatever is asked
    close = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(answer(model), wanted, atol=close, rtol=close)
    with pytest.raises(ph.ConfigError, match="unmerge them first"):
        use_adapters(model, None)
    unmerge_adapters(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(answer(model), wanted)


def test_merged_for_good_it_is_a_plain_model(tmp_path: Path) -> None:
    model = made()
    classes = [type(part) for part in model.modules()]
    add_adapter(model, LoraConfig(targets=("q", "up")))
    learned(model)
    wanted = answer(model)
    merge_adapters(model, keep=False)
    assert [type(part) for part in model.modules()] == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapters_of(model) == {}
    torch.testing.assert_close(answer(model), wanted, atol=1e-5, rtol=1e-5)
    model.save(tmp_path)
    torch.testing.assert_close(answer(ph.load(tmp_path)), wanted, atol=1e-5, rtol=1e-5)


def test_the_model_is_saved_without_its_adapters(tmp_path: Path) -> None:
    model = made()
    model.save(tmp_path / "plain")
    add_adapter(model)
    learned(model)
    model.save(tmp_path / "adapted")
    one, other = (tmp_path / name / "model.safetensors" for name in ("plain", "adapted"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("keep", [True, False])
def test_models_that_hold_the_same_weights_adapt_alone(keep: bool, tmp_path: Path) -> None:
    model = made("gpt2")
    with torch.no_grad():
        before = answer(model)
    other = with_same_weights(model)
    assert all(
        x.data_ptr() == y.data_ptr()
        for x, y in zip(model.parameters(), other.parameters(), strict=True)
    )
    teacher = made("gpt2")
    add_adapter(teacher, LoraConfig(trained=("norm",)))
    learned(teacher)
    save_adapter(teacher, tmp_path)
    changed = answer(teacher)
    load_adapter(other, tmp_path)
    torch.testing.assert_close(answer(other), changed)
    merge_adapters(other, keep=keep)
    torch.testing.assert_close(answer(other), changed, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(changed, before)
    assert torch.equal(answer(model), before)


def test_several_are_switched_and_mixed() -> None:
    model = made()
    plain = answer(model)
    weight = "backbone.layers.0.attention.q.weight"
    base = model.state_dict()[weight].clone()
    changes: dict[str, Tensor] = {}
    answers: dict[str, Tensor] = {}
    for seed, (name, targets) in enumerate({"a": ("q", "v"), "b": ("q", "down")}.items()):
        add_adapter(model, LoraConfig(targets=targets), name)
        learned(model, seed)
        answers[name] = answer(model)
        merge_adapters(model)
        changes[name] = model.state_dict()[weight] - base
        unmerge_adapters(model)
    assert not torch.allclose(answers["a"], answers["b"], atol=1e-2)
    for name, wanted in answers.items():
        use_adapters(model, name)
        assert torch.equal(answer(model), wanted)
    use_adapters(model, {"a": 0.5, "b": -2.0})
    mixed = answer(model)
    merge_adapters(model)
    torch.testing.assert_close(answer(model), mixed, atol=1e-5, rtol=1e-5)
    found = model.state_dict()[weight] - base
    torch.testing.assert_close(found, 0.5 * changes["a"] - 2 * changes["b"], atol=1e-6, rtol=1e-4)
    unmerge_adapters(model)
    use_adapters(model, None)
    assert torch.equal(answer(model), plain)
    remove_adapters(model)
    assert torch.equal(answer(model), plain)


def test_a_packed_model_takes_the_adapter_it_was_given() -> None:
    model = made(d_model=32)
    add_adapter(model)
    learned(model)
    wanted = answer(model)
    merge_adapters(model, keep=False)
    torch.testing.assert_close(answer(ph.pack(model)), wanted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_adapted_is_said(tmp_path: Path) -> None:
    model = made()
    with pytest.raises(
        ph.ConfigError, match=r"no linear layer of llama is called 'c_attn'.*attention\.q"
    ):
        add_adapter(model, LoraConfig(targets="c_attn"))
    with pytest.raises(ph.ConfigError, match="no part 'classifier'"):
        add_adapter(model, LoraConfig(trained=("classifier",)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_adapter(model)
    with pytest.raises(ph.ConfigError, match="'default' already"):
        add_adapter(model)
    with pytest.raises(ph.ConfigError, match="no adapter 'x'; there is 'default'"):
        use_adapters(model, "x")
    with pytest.raises(ph.ConfigError, match=r"cannot be called 'a\.b'"):
        add_adapter(model, name="a.b")
    add_adapter(model, LoraConfig(dora=True), "long")
    with pytest.raises(ph.ConfigError, match="'long' is a DoRA"):
        use_adapters(model, {"long": 0.5})
    for wrong, message in (
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ):
        with pytest.raises(ph.ConfigError, match=message):
            LoraConfig(**wrong)
    save_adapter(model, tmp_path / "kept")
    with pytest.raises(ph.FileError, match="holds an adapter already"):
        save_adapter(model, tmp_path / "kept")
    with pytest.raises(ph.FileError, match=r"there is no adapter_config\.json"):
        load_adapter(made(), tmp_path)
    with pytest.raises(
        ph.FileError, match=r"adapts .* from 16 to 16 numbers, and the model has 24"
    ):
        load_adapter(made(d_model=24), tmp_path / "kept")
    with pytest.raises(
        ph.FileError, match=r"adapts model\.layers.*which gpt2 does not have.*another"
    ):
        load_adapter(made("gpt2"), tmp_path / "kept")
    said = (tmp_path / "kept" / "adapter_config.json").read_text()
    for old, new, message in (
        ('"LORA"', '"IA3"', "of the kind 'IA3'"),
        ('"bias": "none"', '"bias": "all"', "bias = 'all' is not supported"),
        ('"lora_alpha": 16.0', '"lora_alpha": "much"', "wrong value"),
        ('"alpha_pattern": {}', '"alpha_pattern": {"(": 3}', "alpha_pattern has a wrong value"),
        ('"alpha_pattern": {}', '"alpha_pattern": ["q"]', "alpha_pattern has a wrong value"),
        ('"alpha_pattern": {}', '"alpha_pattern": {".*": "x"}', "alpha_pattern has a wrong value"),
    ):
        (tmp_path / "kept" / "adapter_config.json").write_text(said.replace(old, new))
        with pytest.raises(ph.FileError, match=message):
            load_adapter(made(), tmp_path / "kept")
