"""The objectives of pretraining by name, through the trainer."""

import json
import math

import pytest

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train import loop
from polyhead.train.checkpoint import latest
from polyhead.train.config import TrainConfig
from polyhead.train.registry import objective_named

from .conftest import text

DOCUMENTS = [text(20, seed) for seed in range(8)]
SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32}
# Objective: family, head, options, and the first figure of its metric.
ROWS = {
    "masked-lm": ("bert", "lm", {"choice": "word"}, "accuracy"),
    "nsp": ("bert", "pretraining", {"ratio": 0.2}, "accuracy"),
    "sop": ("albert", "sop", {}, "accuracy"),
    "replaced-token": ("deberta-v2", "rtd", {"choice": "span", "weight": 20.0}, "f1"),
    "span-corruption": ("t5", "lm", {"mean_span": 2.0}, "accuracy"),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    sentinels = [f"<extra_id_{i}>" for i in range(9)]
    return {
        "bert": Tokenizer.train(DOCUMENTS, kind="wordpiece", vocab_size=50),
        "t5": Tokenizer.train(DOCUMENTS, kind="chars", extra_tokens=sentinels),
    }


def trainer(name, tokenizers, out, **fields):
    family, head, options, _ = ROWS[name]
    tokenizer = tokenizers["t5" if family == "t5" else "bert"]
    sizes = SIZES if family == "t5" else {**SIZES, "max_seq_len": 32}
    if family == "deberta-v2":
        sizes["position_buckets"] = 8
    model = ph.build(family, head=head, seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    settings = {
        "steps": 4, "context": 24, "batch_size": 4, "out": str(out), "schedule": "constant",
        "warmup": 0, "validate_batches": 2, "checkpoint_every": 2, "log_every": 1,
        "held_out": 0.4,
    }  # fmt: skip
    config = TrainConfig(**{**settings, **fields})
    return loop.Trainer(model, tokenizer, config, objective=name, options=options, quiet=True)


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_is_taken_up_again_is_the_same(name, tokenizers, tmp_path):
    whole = trainer(name, tokenizers, tmp_path / "whole").fit(DOCUMENTS)
    trainer(name, tokenizers, tmp_path / "parts", steps=2).fit(DOCUMENTS)
    again = trainer(name, tokenizers, tmp_path / "parts")
    parts = again.fit(DOCUMENTS, resume=True)
    figure = f"valid_{ROWS[name][3]}"
    for key in ("loss", "valid_loss", figure):
        assert whole[key] == parts[key], key
    found = [latest(tmp_path / run) for run in ("whole", "parts")]
    states = [
        {p.name: p.read_bytes() for p in sorted((run / "trainer").glob("*.safetensors"))}
        for run in found
    ]
    assert states[0] == states[1]
    model = ph.load(found[0])
    assert model.head_kind == ROWS[name][1]
    assert math.isfinite(again.evaluate(DOCUMENTS[:2])["loss"])
    with pytest.raises(ConfigError, match="another corpus"):
        trainer(name, tokenizers, tmp_path / "parts").fit(DOCUMENTS[1:], resume=True)


def test_masked_characters_are_learned(tmp_path):
    texts = ["abcdef" * 400]
    special = {"mask": "[MASK]", "cls": "[CLS]", "sep": "[SEP]"}
    tokenizer = Tokenizer.train(texts, kind="chars", special_tokens=special)
    model = ph.build(
        "bert", seed=0, vocab_size=tokenizer.vocab_size, max_seq_len=12, d_model=32, num_layers=2,
        num_heads=2, d_ff=64, dropout=0.0, attention_dropout=0.0, init_std=0.1,
    )  # fmt: skip
    config = TrainConfig(
        steps=150, context=12, batch_size=32, lr=5e-3, warmup=10, out=str(tmp_path),
        validate_every=50,
    )  # fmt: skip
    run = loop.Trainer(model, tokenizer, config, objective="masked-lm", quiet=True)
    last = run.fit(texts)
    records = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    losses = [record["valid_loss"] for record in records if "valid_loss" in record]
    assert losses == sorted(losses, reverse=True)
    # Six characters, each as frequent as the others: what stands beside them has to tell.
    assert losses[0] > 0.9 * math.log(6)
    assert losses[-1] < 0.6 * math.log(6)
    assert last["valid_accuracy"] > 0.5


def test_rows_say_what_they_need(tokenizers, tmp_path):
    for name, (_, head, options, _) in ROWS.items():
        kind = objective_named(name)
        assert head in (kind.head, *kind.also)
        assert set(options) <= {*kind.dataset_options, *kind.loss_options}
        assert not kind.columns
    model = ph.build("bert", seed=0, vocab_size=50, max_seq_len=32, **SIZES)
    with pytest.raises(ConfigError, match="head 'rtd'"):
        loop.Trainer(model, tokenizers["bert"], objective="replaced-token")
    config = TrainConfig(context=33, out=str(tmp_path))
    run = loop.Trainer(model, tokenizers["bert"], config, objective="masked-lm", quiet=True)
    with pytest.raises(ConfigError, match="context is 33, and the model takes 32"):
        run.fit(DOCUMENTS)
