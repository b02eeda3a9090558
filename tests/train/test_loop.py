import json
import math
import os
import signal

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.train import checkpoint, loop
from polyhead.train.config import TrainConfig
from polyhead.train.distributed import Parallel
from polyhead.train.log import read_log
from polyhead.train.loop import Interrupted, Trainer
from polyhead.train.objectives import Loss, causal_lm

from .conftest import text, tiny


def trainer(tokenizer, out, model=None, **more):
    names = ("objective", "sample", "callbacks")
    extra = {name: more.pop(name) for name in names if name in more}
    sizes = {"steps": 12, "batch_size": 4, "context": 16, "log_every": 4, "lr": 1e-2}
    config = TrainConfig(out=str(out), **{**sizes, **more})
    return Trainer(model or tiny(tokenizer.vocab_size), tokenizer, config, quiet=True, **extra)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_learns_and_its_checkpoint_is_that_model(run, tokenizer, dtype, family):
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
    model = ph.build(family, seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    made = trainer(tokenizer, run, model, dtype=dtype, steps=60, validate_every=20)
    result = made.fit([text(200)])
    records = read_log(run / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] > 2.5
    assert losses[-1] < 0.75 * losses[0]
    assert result["step"] == 60
    assert result["valid_loss"] == [r for r in records if "valid_loss" in r][-1]["valid_loss"]
    loaded = ph.load(result["checkpoint"])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert ph.tokenizer(result["checkpoint"]).encode("a cat") == tokenizer.encode("a cat")
    unseen = made.evaluate([text(5, seed=1)])
    assert unseen["loss"] < 0.8 * losses[0]
    assert unseen["bits_per_byte"] == pytest.approx(unseen["loss"] / math.log(2), rel=0.02)


def test_the_log_says_what_happened(run, tokenizer):
    seen = []
    made = trainer(
        tokenizer, run, validate_every=6, sample_every=6,
        sample=lambda model, tok, config: f"{model.training} {torch.rand(1).item():.3f}",
        callbacks=[lambda t, record: seen.append(record)],
    )  # fmt: skip
    made.fit([text(60)])
    records = read_log(run / "log.jsonl")
    assert records == seen
    assert [r["step"] for r in records if "loss" in r] == [4, 8, 12]
    assert [r["step"] for r in records if "valid_loss" in r] == [6, 12]
    samples = [r["sample"] for r in records if "sample" in r]
    assert len(samples) == 2
    assert len(set(samples)) == 1, "a sample has its own random numbers"
    assert samples[0].startswith("False")
    line = next(r for r in records if "loss" in r)
    assert line["tokens"] == 4 * 4 * 16
    assert line["tokens_per_second"] > 0
    assert line["memory_bytes"] > 1 << 20
    assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2), rel=0.01)
    assert TrainConfig.load(run / "config.toml") == made.config


def test_samples_do_not_disturb_the_training(tmp_path, tokenizer):
    weights = []
    for every in (0, 2):
        model = tiny(tokenizer.vocab_size, dropout=0.2)
        made = trainer(
            tokenizer, tmp_path / str(every), model, sample_every=every, validate_every=3 * every,
            sample=lambda *_: str(torch.rand(5)),
        )  # fmt: skip
        made.fit([text(60)])
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(tmp_path, tokenizer, signum, code):
    def kill(made, record):
        if record["step"] == 4:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    model = tiny(tokenizer.vocab_size)
    with pytest.raises(Interrupted) as stopped:
        trainer(tokenizer, tmp_path / "a", model, callbacks=[kill]).fit([text(60)])
    assert signal.getsignal(signum) is before
    assert stopped.value.code == code
    assert stopped.value.step == 4
    assert stopped.value.checkpoint == checkpoint.latest(tmp_path / "a")
    assert stopped.value.checkpoint.name == "step-00000004"
    trainer(tokenizer, tmp_path / "a", model).fit([text(60)], resume=True)
    other = tiny(tokenizer.vocab_size)
    trainer(tokenizer, tmp_path / "b", other).fit([text(60)])
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("step", [0, 5, 11])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_is_never_saved(run, tokenizer, step, value):
    calls = []

    def objective(model, batch):
        loss = causal_lm(model, batch)
        calls.append(0)
        if model.training and sum(1 for _ in calls) == step + 1:
            return Loss(loss.total * value, loss.tokens, loss.parts)
        return loss

    model = tiny(tokenizer.vocab_size)
    made = trainer(
        tokenizer, run, model, objective=objective, checkpoint_every=3, held_out=0.0, skips=0
    )
    with pytest.raises(PolyheadError, match=r"loss is (nan|inf)"):
        made.fit([text(60)])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    last = checkpoint.latest(run)
    assert (last is None) == (step < 3)
    assert last is None or int(last.name[5:]) <= step


def test_a_run_is_not_overwritten(run, tokenizer):
    trainer(tokenizer, run).fit([text(60)])
    with pytest.raises(FileError, match="already holds a run"):
        trainer(tokenizer, run).fit([text(60)])
    (run / "mine.txt").write_text("stays")
    trainer(tokenizer, run, lr=2e-3).fit([text(60)], force=True)
    assert (run / "mine.txt").exists()
    assert len([r for r in read_log(run / "log.jsonl") if "loss" in r]) == 3
    assert TrainConfig.load(run / "config.toml").lr == 2e-3


def test_resume_begins_where_there_is_nothing_yet(run, tokenizer):
    assert trainer(tokenizer, run).fit([text(60)], resume=True)["step"] == 12
    assert trainer(tokenizer, run).fit([text(60)], resume=True)["step"] == 12


def test_a_log_cut_short_by_a_kill_is_mended(run, tokenizer):
    trainer(tokenizer, run, checkpoint_every=4, schedule="constant").fit([text(60)])
    whole = read_log(run / "log.jsonl")
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "loss": 0.0}) + '\n{"step": 14, "lo')
    trainer(tokenizer, run, schedule="constant").fit([text(60)], resume=True)
    assert read_log(run / "log.jsonl") == whole


def test_bad_input_is_one_line(run, tokenizer):
    with pytest.raises(ConfigError, match="context is 65, and the model takes 64"):
        trainer(tokenizer, run, context=65)
    with pytest.raises(ConfigError, match="no such device"):
        trainer(tokenizer, run, device="toaster").fit([text(60)], force=True)
    with pytest.raises(DataError, match="add text"):
        trainer(tokenizer, run).fit(["a cat"], force=True)
    with pytest.raises(DataError, match="empty"):
        trainer(tokenizer, run).fit([], force=True)
    with pytest.raises(DataError, match="empty"):
        trainer(tokenizer, run).fit([text(60)], [], force=True)


def test_a_start_that_fails_costs_no_run_and_blocks_none(run, tokenizer):
    with pytest.raises(DataError, match="add text"):
        trainer(tokenizer, run).fit(["a cat"])
    saved = trainer(tokenizer, run).fit([text(60)])["checkpoint"]
    for setting, texts in (({"device": "toaster"}, [text(60)]), ({}, ["a cat"]), ({}, "none.txt")):
        with pytest.raises(PolyheadError):
            trainer(tokenizer, run, **setting).fit(texts, force=True)
    assert checkpoint.latest(run) == run / "checkpoints" / os.path.basename(saved)
    assert read_log(run / "log.jsonl")


def test_a_directory_without_checkpoint_or_log_is_no_run(run, tokenizer):
    (run / "checkpoints" / ".tmp-step-00000001-7").mkdir(parents=True)
    (run / "log.jsonl").touch()
    (run / "config.toml").write_text("lr = 0.5\n")
    assert trainer(tokenizer, run).fit([text(60)])["step"] == 12
    assert TrainConfig.load(run / "config.toml").lr == 1e-2


def test_a_text_in_place_of_a_path_is_said(run, tokenizer):
    for words in ("the cat sat", "the cat sat on a mat and saw that it was flat. " * 200):
        with pytest.raises(DataError, match="pass a list of texts") as error:
            trainer(tokenizer, run).fit(words)
        assert len(str(error.value)) < 160
        with pytest.raises(DataError, match="pass a list of texts"):
            trainer(tokenizer, run).evaluate(words)
    with pytest.raises(DataError, match="not a int"):
        trainer(tokenizer, run).fit(3)


def test_texts_may_come_from_a_generator(run, tokenizer):
    made = trainer(tokenizer, run)
    assert made.fit(text(30, seed) for seed in (1, 2))["step"] == 12
    texts = [text(2, 3), text(2, 4)]
    assert made.evaluate(t for t in texts) == made.evaluate(texts)


def test_a_model_that_sees_ahead_is_refused(run, tokenizer):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "max_seq_len": 64}
    seeing = ph.build("transformer", kind="encoder", vocab_size=tokenizer.vocab_size, **sizes)
    with pytest.raises(ConfigError, match="encoder"):
        trainer(tokenizer, run, model=seeing)


def test_validation_text_of_ones_own(run, tokenizer):
    made = trainer(tokenizer, run, validate_batches=0)
    result = made.fit([text(60)], valid=[text(20, seed=5)])
    # Windows side by side see less than sliding ones, but score the same text.
    whole = made.evaluate([text(20, seed=5)], stride=16)
    assert result["valid_loss"] == pytest.approx(whole["loss"], rel=0.05)


def test_the_default_sample_is_the_models_own(run, tokenizer):
    pytest.importorskip("polyhead.generate.generator", reason="the generator is not there")
    made = trainer(tokenizer, run, sample_every=12, sample_prompt="the ", sample_tokens=5)
    made.fit([text(60)])
    sample = next(r["sample"] for r in read_log(run / "log.jsonl") if "sample" in r)
    assert sample.startswith("the ")
    assert loop.write_sample(made.model, tokenizer, made.config) == sample


def test_weights_are_made_whole_only_where_that_is_due(run, tokenizer, monkeypatch):
    entered = []
    whole = Parallel.whole

    def counted(self):
        entered.append(1)
        return whole(self)

    monkeypatch.setattr(Parallel, "whole", counted)
    made = trainer(tokenizer, run, steps=12, validate_every=6, checkpoint_every=0, ema=0.9)
    made.fit([text(60)])
    assert len(entered) == 3  # two validations and one checkpoint
