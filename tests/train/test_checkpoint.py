import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.log import TIMES, read_log
from polyhead.train.loop import Trainer

from .conftest import text, tiny

SETTINGS = {
    "steps": 20, "batch_size": 2, "context": 16, "warmup": 3, "log_every": 3,
    "checkpoint_every": 5, "validate_every": 4, "validate_batches": 2,
}  # fmt: skip
DROPOUT = {"dropout": 0.1, "embedding_dropout": 0.1}


def begin(out, tokenizer, *, resume=False, texts=None, callbacks=(), model=None, **settings):
    model = model or tiny(tokenizer.vocab_size, **DROPOUT)
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = Trainer(model, tokenizer, config, callbacks=callbacks, quiet=True)
    trainer.fit(texts or [text(60)], resume=resume)
    return model


def final_state(out: Path):
    """Everything a finished run left, but for the times."""
    last = checkpoint.latest(out)
    tensors = {name: t.clone() for name, t in open_checkpoint(last / "trainer").items()}
    tensors |= {name: t.clone() for name, t in open_checkpoint(last).items()}
    state = json.loads((last / "trainer" / "state.json").read_text())
    state["config"].pop("out")
    log = [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_log(out / "log.jsonl")
    ]
    return tensors, state, log


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert one[1] == other[1]
    assert one[2] == other[2]


class Stop(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


def stop_at(step):
    def callback(trainer, record):
        if record["step"] >= step:
            raise Stop

    return callback


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_an_end_and_ten_more_are_twenty(tmp_path, tokenizer, dtype, accumulate):
    settings = {"dtype": dtype, "accumulate": accumulate}
    begin(tmp_path / "whole", tokenizer, **settings)
    with pytest.raises(Stop):
        begin(tmp_path / "cut", tokenizer, callbacks=[stop_at(12)], **settings)
    assert checkpoint.latest(tmp_path / "cut").name == "step-00000010"
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    # Another process would draw other weights: none of them may be left.
    model = tiny(tokenizer.vocab_size, seed=7, **DROPOUT)
    begin(tmp_path / "cut", tokenizer, resume=True, model=model, **settings)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None  # python's and numpy's were never the run's own
    assert_same(whole, cut)
    state = open_checkpoint(checkpoint.latest(tmp_path / "cut"))
    theirs = ph.load(checkpoint.latest(tmp_path / "cut"))
    assert state
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])


def test_random_states_are_taken_up(tmp_path, tokenizer):
    begin(tmp_path / "run", tokenizer)
    drawn = torch.rand(3), random.random(), np.random.rand()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    begin(tmp_path / "run", tokenizer, resume=True)
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path, tokenizer):
    begin(tmp_path, tokenizer)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-00000025-1").mkdir()
    (folder / ".tmp-step-00000025-1" / "model.safetensors").write_text("half")
    (folder / "step-00000030").mkdir()  # no manifest: not whole
    assert checkpoint.latest(tmp_path).name == "step-00000020"
    (folder / "latest").unlink()
    assert checkpoint.latest(tmp_path).name == "step-00000020"
    begin(tmp_path, tokenizer, resume=True)
    assert not list(folder.glob(".*"))


def test_the_newest_and_the_best_are_kept(tmp_path, tokenizer, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    score = type("Score", (), {"loss": 0.0, "bits_per_byte": 1.0})

    def scored(*args, **named):
        return type("S", (score,), {"loss": next(losses)})()

    monkeypatch.setattr("polyhead.train.running.score_tokens", scored)
    begin(tmp_path, tokenizer, keep=1, validate_every=0)
    found = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert found == ["step-00000010", "step-00000020"]
    assert checkpoint.best(tmp_path).name == "step-00000010"


def test_older_checkpoints_stay_when_the_new_one_cannot_be_read_back(
    tmp_path, tokenizer, monkeypatch
):
    def damaged(folder, ranks):
        raise FileError("damaged")

    begin(tmp_path, tokenizer, steps=10, schedule="constant", keep=1)
    monkeypatch.setattr(checkpoint, "verify", damaged)
    monkeypatch.setattr("polyhead.train.checkpoint.restore", RESTORE_UNVERIFIED)
    with pytest.raises(FileError, match="damaged"):
        begin(tmp_path, tokenizer, schedule="constant", keep=1, resume=True)
    assert (tmp_path / "checkpoints" / "step-00000010").exists()


def RESTORE_UNVERIFIED(*args):  # noqa: N802
    return checkpoint.Progress(10, TrainConfig(), args[4])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "was altered"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "was altered"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, tokenizer, damage, says):
    begin(tmp_path, tokenizer)
    damage(checkpoint.latest(tmp_path) / "trainer" / "model.safetensors")
    with pytest.raises(FileError, match=says):
        begin(tmp_path, tokenizer, resume=True)


def test_another_model_or_other_settings_are_refused_in_one_line(tmp_path, tokenizer):
    begin(tmp_path, tokenizer)
    size = tokenizer.vocab_size
    cases = [
        ({"model": tiny(size, d_model=32)}, "another model"),
        ({"model": tiny(size, num_layers=3)}, "another model"),
        ({"model": tiny(size, num_layers=1, **DROPOUT)}, "another model: n_layer is 2 there and 1"),
        ({"model": tiny(size, num_heads=4, **DROPOUT)}, "another model: n_head is 2 there and 4"),
        ({"lr": 0.5}, "lr = 0.001, not 0.5"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"steps": 40}, "learning rates"),
        ({"texts": [text(61)]}, "another corpus"),
    ]
    for settings, says in cases:
        with pytest.raises(ConfigError) as error:
            begin(tmp_path, tokenizer, resume=True, **settings)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_a_run_with_an_open_end_goes_on(tmp_path, tokenizer):
    begin(tmp_path / "a", tokenizer, schedule="constant")
    begin(tmp_path / "b", tokenizer, schedule="constant", steps=10)
    begin(tmp_path / "b", tokenizer, schedule="constant", steps=20, resume=True)
    a, b = final_state(tmp_path / "a")[0], final_state(tmp_path / "b")[0]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, tokenizer, monkeypatch):
    def full(*args, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync_files", full)
    with pytest.raises(FileError, match="No space left"):
        begin(tmp_path, tokenizer)
    assert not list((tmp_path / "checkpoints").iterdir())
