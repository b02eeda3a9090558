"""The campaigns of `make reliability`, a few rounds each, and what a resume meets at its edges."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from benchmarks.reliability import notfinite, repeated, runs, stopped

from polyhead.errors import ConfigError, FileError, PolyheadError
from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.blend import Corpus
from polyhead.train.config import TrainConfig
from polyhead.train.loop import Trainer
from polyhead.train.optim import Masters

from .conftest import text, tiny

SETTINGS = {
    "steps": 12, "batch_size": 2, "context": 16, "warmup": 2, "log_every": 1, "checkpoint_every": 4,
    "validate_every": 5, "validate_batches": 1, "schedule": "constant",
}  # fmt: skip


class Stop(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """In this process no power is cut: what is flushed need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def fit(out, tokenizer, *, data=None, stop=None, resume=False, spoil=None, **settings):
    """A run, or what is left of one that ends at `stop`."""

    def watch(trainer, record):
        if spoil is not None:
            spoil(trainer, record)
        if stop is not None and record["step"] >= stop:
            raise Stop

    model = tiny(tokenizer.vocab_size, dropout=0.1, embedding_dropout=0.1)
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = Trainer(model, tokenizer, config, callbacks=[watch], quiet=True)
    if stop is None:
        return trainer.fit(data or [text(60)], resume=resume)
    with pytest.raises(Stop):
        trainer.fit(data or [text(60)], resume=resume)
    return None


def test_a_sigkill_inside_a_write_costs_nothing(tmp_path):
    settings = {"steps": 23, "dtype": "bfloat16"}
    found = stopped.killed_in_writes(tmp_path, 3, **settings)
    assert found["ok"], found
    assert found["signals"] == 3
    assert found["exit_codes"] == [-9]
    # A second checkpoint was written, and the ones before it were removed.
    assert {p.name for p in (tmp_path / "cut-1" / "checkpoints").glob("step-*")} == {
        "step-00000021",
        "step-00000023",
    }


def test_a_terminated_run_saves_and_goes_on(tmp_path):
    found = stopped.terminated(tmp_path, 1, steps=30)
    assert found["ok"], found
    assert found["exit_codes"] == [143]


def test_the_same_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(repeated, "STEPS", 8)
    found = repeated.repeated(tmp_path, 2, ["chat"])
    assert found["ok"], found
    assert found["runs"] == 2


def test_two_ranks_with_dropout_are_killed_and_go_on(tmp_path):
    found = stopped.killed_in_writes(tmp_path, 1, 2, steps=9, checkpoint_every=4)
    assert found["ok"], found


def test_what_is_compared_would_show_a_difference(tmp_path, tokenizer):
    fit(tmp_path / "a", tokenizer)
    fit(tmp_path / "b", tokenizer)
    assert runs.left(tmp_path / "a") == runs.left(tmp_path / "b")
    fit(tmp_path / "c", tokenizer, seed=1)
    assert runs.left(tmp_path / "a") != runs.left(tmp_path / "c")
    log = tmp_path / "b" / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 3', '"step": 33'))
    assert runs.left(tmp_path / "a") != runs.left(tmp_path / "b")


def test_no_number_is_caught_wherever_it_comes_from(tmp_path):
    found = notfinite.injected(tmp_path, 1)
    assert found["ok"], found["faults"]
    assert found["places"] >= 20


def test_squares_that_overflow_are_no_fault(tokenizer):
    model = tiny(tokenizer.vocab_size)
    optimizer = Masters(model, TrainConfig())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e14)
        optimizer.step(1e-3)
    moments = [t for name, t in optimizer.state().items() if name.startswith("exp_avg_sq")]
    for moment in moments:
        moment.fill_(1e30)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)


def test_a_weight_that_no_loss_reads_is_not_saved_either(tmp_path, tokenizer):
    def spoil(trainer, record):
        if record["step"] == 5:
            with torch.no_grad():
                trainer.model.get_parameter("backbone.positions.weight")[60] = float("nan")

    with pytest.raises(PolyheadError, match=r"positions\.weight is no longer finite.*resume from"):
        fit(tmp_path, tokenizer, spoil=spoil)
    assert checkpoint.latest(tmp_path).name == "step-00000004"
    fit(tmp_path, tokenizer, resume=True)


@pytest.mark.parametrize("touch", [1, 4, 9, 14, 22, 31, 40])
def test_a_disk_that_is_full_is_one_line_and_nothing_is_lost(
    tmp_path, tokenizer, monkeypatch, touch
):
    """Every so many flushes to disk: of the tokens, the settings, the log, a checkpoint."""
    whole, run, left = tmp_path / "whole", tmp_path / "run", touch
    fit(whole, tokenizer)

    def full(file):
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(FileError, match="No space left on device") as error:
            fit(run, tokenizer)
    assert "\n" not in str(error.value)
    assert not list((run / "checkpoints").glob(".*"))
    if (last := checkpoint.latest(run)) is not None:
        checkpoint.verify(last)
    fit(run, tokenizer, resume=True)
    assert runs.left(run) == runs.left(whole)


GONE = {
    "removed": lambda run: shutil.rmtree(run),
    "moved": lambda run: run.rename(run.with_name("elsewhere")),
    "log": lambda run: (run / "log.jsonl").unlink(),
}


@pytest.mark.parametrize("how", GONE)
def test_a_run_directory_that_goes_is_told_at_the_next_write(tmp_path, tokenizer, how):
    run = tmp_path / "run"

    def lose(trainer, record):
        assert record["step"] == 2, "went on after its directory had gone"
        GONE[how](run)

    with pytest.raises(FileError, match=r"log\.jsonl cannot be written .*resume"):
        fit(run, tokenizer, spoil=lose, log_every=2)
    assert how == "log" or not run.exists()


def test_a_checkpoint_does_not_make_a_lost_directory_again(tmp_path, tokenizer):
    def lose(trainer, record):
        shutil.rmtree(tmp_path / "run")

    with pytest.raises(FileError, match="step-00000004: cannot be written"):
        fit(tmp_path / "run", tokenizer, spoil=lose, log_every=4, validate_every=0, held_out=0.0)
    assert not (tmp_path / "run").exists()


EPOCH = 24  # rows; a step takes 4


@pytest.mark.parametrize("stop", [5, 6, 7, 11, 12, 13])
@pytest.mark.parametrize("kind", ["windows", "blend"])
def test_a_stop_around_the_end_of_an_epoch_loses_no_row(tmp_path, tokenizer, stop, kind):
    """Epochs end with steps 6 and 12; the saved step is the one before the stop, it and after."""
    lines = text(200)
    size = 16 * EPOCH + 1
    data = [lines[:size]]
    if kind == "blend":
        data = {"a": Corpus([lines[: size // 2]], 0.5), "b": Corpus([lines[size:]], 0.5)}
    settings = {"steps": 14, "accumulate": 2, "held_out": 0.0, "checkpoint_every": 0}
    fit(tmp_path / "whole", tokenizer, data=data, **settings)
    saves = {**settings, "checkpoint_every": stop}
    fit(tmp_path / "cut", tokenizer, data=data, stop=stop + 1, **saves)
    assert checkpoint.latest(tmp_path / "cut").name == f"step-{stop:08d}"
    fit(tmp_path / "cut", tokenizer, data=data, resume=True, **settings)
    assert runs.left(tmp_path / "cut") == runs.left(tmp_path / "whole")


def _newer(last):
    manifest = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGES = {
    "no moments": (lambda last: (last / "trainer" / "model.safetensors").unlink(), "is missing"),
    "cut weights": (lambda last: os.truncate(last / "model.safetensors", 100), "was altered"),
    "cut moments": (
        lambda last: os.truncate(last / "trainer" / "model.safetensors", 4096), "was altered",
    ),
    "cut manifest": (lambda last: os.truncate(last / "manifest.json", 30), "manifest cannot be"),
    "newer": (_newer, "format 99, and this polyhead reads up to"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(tmp_path, tokenizer, damage):
    fit(tmp_path, tokenizer)
    spoil, said = DAMAGES[damage]
    spoil(checkpoint.latest(tmp_path))
    with pytest.raises(FileError, match=said) as error:
        fit(tmp_path, tokenizer, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pointer", ["step-00009999", "", "../../../etc", None])
def test_a_pointer_to_nowhere_is_not_followed(tmp_path, tokenizer, pointer):
    fit(tmp_path, tokenizer)
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink() if pointer is None else latest.write_text(pointer)
    assert checkpoint.latest(tmp_path).name == "step-00000012"


@pytest.mark.parametrize("end", ['{"step": 9, "lo', "{", "\0" * 40, '{"step": 9, "loss": 1}'])
def test_a_torn_line_of_the_log_is_written_anew(tmp_path, tokenizer, end):
    fit(tmp_path / "whole", tokenizer)
    fit(tmp_path / "cut", tokenizer, stop=10)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write(end)
    fit(tmp_path / "cut", tokenizer, resume=True)
    assert runs.left(tmp_path / "cut") == runs.left(tmp_path / "whole")


def test_what_a_resume_may_change_and_what_not(tmp_path, tokenizer):
    fit(tmp_path, tokenizer, stop=6)
    for name, value in {"dtype": "bfloat16", "accumulate": 2, "batch_size": 4, "seed": 3}.items():
        with pytest.raises(ConfigError, match=rf"{name} = .*, not {value}: .* may change, or"):
            fit(tmp_path, tokenizer, resume=True, **{name: value})
    torch.set_num_threads(2)  # back to one by the fixture
    fit(tmp_path, tokenizer, resume=True, log_every=3, checkpoint_every=0, keep=1)


def test_dropout_is_that_of_the_batch_whoever_draws_it(tmp_path, tokenizer):
    """What a callback, a reward or a sample draws besides does not move the run."""
    fit(tmp_path / "a", tokenizer)
    fit(tmp_path / "b", tokenizer, spoil=lambda *_: torch.rand(3))
    a, b = (open_checkpoint(checkpoint.latest(tmp_path / name)) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in dict(a.items()))


def test_python_and_numpy_are_seeded_too(tmp_path, tokenizer):
    drawn = []
    for name in "ab":
        np.random.seed(len(drawn))
        fit(tmp_path / name, tokenizer, steps=2, spoil=lambda *_: drawn.append(np.random.rand()))
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]
