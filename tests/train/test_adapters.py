"""An adapter learns beside a model that stays as it is, and is all that a run keeps."""

from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.loop import Trainer

from .conftest import text, tiny
from .test_checkpoint import Stop, assert_same, final_state, stop_at

SETTINGS = dict(
    steps=20, batch_size=2, context=16, warmup=3, log_every=3, checkpoint_every=5,
    validate_every=4, validate_batches=2, lr=1e-2,
)  # fmt: skip
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(tokenizer.vocab_size, dropout=0.1).save(folder)
    tokenizer.save(folder, force=True)
    return folder


def adapted(base: Path, **config):
    model = ph.load(base)
    torch.manual_seed(1)
    ph.add_adapter(model, ph.LoraConfig(rank=2, **config))
    return model


def fit(model, tokenizer, out, *, resume=False, callbacks=(), **settings):
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = Trainer(model, tokenizer, config, callbacks=callbacks, quiet=True)
    trainer.fit([text(60)], resume=resume)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{}, {"dora": True}, {"dropout": 0.2, "targets": "all-linear"}])
def test_ten_steps_an_end_and_ten_more_are_twenty(tmp_path, base, tokenizer, dtype, config):
    fit(adapted(base, **config), tokenizer, tmp_path / "whole", dtype=dtype)
    with pytest.raises(Stop):
        fit(adapted(base, **config), tokenizer, tmp_path / "cut", dtype=dtype,
            callbacks=[stop_at(12)])  # fmt: skip
    torch.manual_seed(99)
    again = ph.load(checkpoint.latest(tmp_path / "cut"))
    fit(again, tokenizer, tmp_path / "cut", dtype=dtype, resume=True)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)


def test_the_base_stays_and_the_checkpoint_holds_the_adapter_alone(tmp_path, base, tokenizer):
    model = fit(adapted(base), tokenizer, tmp_path / "run")
    before = ph.load(base)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    last = checkpoint.latest(tmp_path / "run")
    assert not list(last.glob("model*"))
    assert all("lora" in name for name in open_checkpoint(last / "adapter_model.safetensors"))
    kept = open_checkpoint(last / "trainer")
    assert all("adapters" in name or name.startswith("rng") for name in kept)
    loaded = ph.load(last)
    assert torch.equal(loaded(IDS), model(IDS))
    assert not torch.allclose(loaded(IDS), before(IDS), atol=1e-3)
    assert torch.equal(ph.load(base, adapter=last)(IDS), model(IDS))
    with ph.without_adapters(loaded):
        assert torch.equal(loaded(IDS), before(IDS))
    assert ph.tokenizer(last).vocab_size == tokenizer.vocab_size


def test_an_adapter_is_refused_beside_other_weights(tmp_path, base, tokenizer):
    fit(adapted(base), tokenizer, tmp_path / "run")
    last = checkpoint.latest(tmp_path / "run")
    other = tiny(tokenizer.vocab_size, seed=3, dropout=0.1)
    with pytest.raises(FileError, match=f"trained beside other weights, of {base}"):
        ph.load_adapter(other, last)
    assert not any("adapters" in name for name, _ in other.named_modules())
    ph.load_adapter(other, last, any_base=True)
    with pytest.raises(FileError, match="beside other weights"):
        fit(other, tokenizer, tmp_path / "run", resume=True)
    ph.load_adapter(ph.load(base, dtype="bfloat16"), last)
    with pytest.raises(ConfigError, match="holds an adapter, and the model has none"):
        fit(ph.load(base), tokenizer, tmp_path / "run", resume=True)


def test_what_cannot_learn_is_refused(tmp_path, base, tokenizer):
    model = adapted(base)
    ph.add_adapter(model, ph.LoraConfig(rank=2), name="second")
    ph.use_adapters(model, {"default": 0.5, "second": 0.5})
    with pytest.raises(ConfigError, match="default, second are in use"):
        fit(model, tokenizer, tmp_path / "run")
    ph.use_adapters(model, None)
    with pytest.raises(ConfigError, match="no weight of the model learns"):
        fit(model, tokenizer, tmp_path / "run")
    ph.use_adapters(model, "default")
    fit(model, tokenizer, tmp_path / "run")


def test_a_fresh_head_travels_with_the_adapter(tmp_path, tokenizer):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "max_seq_len": 32}
    words = ph.Tokenizer.train([text(50)], kind="wordpiece", vocab_size=60)
    ph.build("bert", vocab_size=words.vocab_size, **sizes).save(tmp_path / "base")
    rows = [{"text": line, "label": "cat" if "cat" in line else "none"}
            for line in text(80).splitlines()]  # fmt: skip
    model = ph.load(tmp_path / "base", head="classify", labels=["cat", "none"])
    ph.add_adapter(model, ph.LoraConfig(rank=2))
    config = TrainConfig.fine_tuning(steps=4, lr=1e-2, out=str(tmp_path / "run"), context=16)
    Trainer(model, words, config, objective="classify", quiet=True).fit(rows)
    last = checkpoint.latest(tmp_path / "run")
    loaded = ph.load(last)
    assert loaded.config.labels == ("cat", "none")
    assert torch.equal(loaded(IDS), model(IDS))
