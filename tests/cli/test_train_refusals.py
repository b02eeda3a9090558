"""What `polyhead train` says, in one line and with exit code 2, where it cannot go on."""

import errno
import json
import os
import shutil

import pytest
import torch
from tests.cli.conftest import CHATML, save_model

from polyhead.models.load import load
from polyhead.train import running

SMALL = (
    *("--set", "d_model=16", "num_layers=1", "num_heads=2", "--steps", 4, "--batch-size", 2),
    *("--context", 16, "--validate-batches", 1, "--log-every", 1, "--sample-every", 0),
    *("--checkpoint-every", 2),
)
CHATTY = (*SMALL[4:], "--context", 64)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. \n" * 30)
    return file


@pytest.fixture
def begun(cli, text, tmp_path):
    """A run of four steps."""
    assert cli("train", text, *SMALL, "--out", tmp_path / "run").code == 0
    return tmp_path / "run"


def refused(found, *said):
    """One line that says it, and exit code 2."""
    assert found.code == 2, found.err
    line = found.err.strip().splitlines()[-1]
    assert line.startswith("polyhead: ")
    assert "Traceback" not in found.err
    for words in said:
        assert words in line, line


@pytest.fixture
def at_step(monkeypatch):
    """Does something before the n-th step of a run."""

    def put(number, what):
        step = running.Running._step

        def disturbed(self, at):
            if at == number:
                what(self)
            return step(self, at)

        monkeypatch.setattr(running.Running, "_step", disturbed)

    return put


SETTINGS = [
    (("--lr", 0.5), "lr = 0.001, not 0.5", "steps, device, parallel"),
    (("--batch-size", 4), "batch_size = 2, not 4", "start a new run"),
    (("--accumulate", 2), "accumulate = 1, not 2", "start a new run"),
    (("--dtype", "bfloat16"), "dtype = float32, not bfloat16", "start a new run"),
    (("--steps", 9), "steps = 9 instead of 4", "schedule constant"),
    (("--steps", 2), "has 4 steps behind it, more than 2", ""),
    (("--set", "d_model=32"), "--set is taken from the run", "leave it out"),
    (("--model", "llama"), "--model is taken from the run", "leave it out"),
]


@pytest.mark.parametrize(("flags", "what", "advice"), SETTINGS, ids=lambda v: str(v)[:20])
def test_a_resume_with_another_setting(cli, begun, flags, what, advice):
    refused(cli("train", "--out", begun, "--resume", *flags), what, advice)


def test_a_resume_with_other_data(cli, begun, text, tmp_path):
    text.write_text(text.read_text() + "and one more line. \n" * 9)
    refused(cli("train", "--out", begun, "--resume"), "another corpus", "unchanged, or start a new")
    text.unlink()
    refused(cli("train", "--out", begun, "--resume"), "text.txt")


def test_a_resume_on_more_processes_than_can_share(cli, begun, monkeypatch):
    from polyhead.train.ranks import Ranks

    monkeypatch.setattr("polyhead.train.loop.joined", lambda device, tensor: (Ranks(0, 2), "cpu"))
    found = cli("train", "--out", begun, "--resume")
    refused(found, "2 processes cannot share the 1 batches of a step", "start 1")


def test_an_adapter_for_another_base(cli, text, tmp_path):
    base = save_model(tmp_path / "base", CHATML)
    words = (*SMALL[4:], "--schedule", "constant", "--out", tmp_path / "run")
    assert cli("train", text, "--model", base, "--lora", "rank=2", *words).code == 0
    shutil.rmtree(base)
    refused(cli("train", "--out", tmp_path / "run", "--resume", "--steps", 6), "base")
    save_model(base, None, "gpt2")
    refused(cli("train", "--out", tmp_path / "run", "--resume", "--steps", 6), "another model")
    shutil.rmtree(base)
    save_model(base, CHATML)
    model = load(base)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-3)
    model.save(base, force=True)
    found = cli("train", "--out", tmp_path / "run", "--resume", "--steps", 6)
    refused(found, "was trained beside other weights", str(base))


ROW = {"prompt": "a day", "chosen": "fine", "rejected": "poor"}
ROWS = {
    "no rejected": ([ROW, {"prompt": "b", "chosen": "c"}], "dpo", "line 2", "'rejected'"),
    "an empty one": ([ROW, {**ROW, "rejected": None}] * 4, "dpo", "row", "rejected is None"),
    "nobody's": ([{"prompt": "b", "chosen": "c"}] * 4, "dpo", "no column 'rejected'", "name yours"),
    "no answer": ([{"prompt": "b"}] * 4, "chat", "answer is None", "must be text"),
    "a number": ([{"prompt": "b", "answer": 3}] * 4, "chat", "answer is 3", "must be text"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_lack_something(cli, chatty, tmp_path, case):
    rows, objective, *said = ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--objective", objective, "--model", chatty, *CHATTY, "--out", tmp_path / "run")
    refused(cli("train", path, *words), "rows.jsonl", *said)


def test_the_row_that_lacks_an_answer_is_named_as_it_stands_in_the_file(cli, chatty, tmp_path):
    """Whether it is learned from or held out."""
    path = tmp_path / "rows.jsonl"
    words = ("--objective", "dpo", "--model", chatty, *CHATTY, "--out", tmp_path / "run")
    for bad in range(6):
        rows = [{**ROW, "rejected": None} if n == bad else ROW for n in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        refused(cli("train", path, *words, "--held-out", 0.4), f"row {bad}: rejected is None")


@pytest.mark.parametrize("flushes", [1, 6, 12, 20, 30])
def test_no_space_left(cli, text, tmp_path, monkeypatch, flushes):
    def full(file):
        nonlocal flushes
        flushes -= 1
        if flushes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = cli("train", text, *SMALL, "--out", tmp_path / "run")
    refused(found, "No space left on device", str(tmp_path))


@pytest.mark.parametrize("name", ["log.jsonl", "config.toml", "checkpoints"])
def test_a_run_directory_where_nothing_can_be_written(cli, begun, monkeypatch, name):
    path = begun / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("") if name == "checkpoints" else path.mkdir()
    said = "cannot begin in" if name == "checkpoints" else name
    refused(cli("train", "--out", begun, "--resume"), said)


def test_a_disk_that_is_lost(cli, text, tmp_path, at_step, monkeypatch):
    run = tmp_path / "run"
    at_step(2, lambda running: run.rename(tmp_path / "gone"))
    found = cli("train", text, *SMALL, "--out", run)
    refused(found, "log.jsonl cannot be written (No such file or directory)", "and resume")
    assert not run.exists()
    (tmp_path / "gone").rename(run)
    monkeypatch.undo()
    assert cli("train", "--out", run, "--resume").code == 0


def test_memory_that_runs_out_is_answered_with_a_batch_that_fits(cli, text, tmp_path, at_step):
    def starve(running):
        objective = running.trainer.objective

        def hungry(model, batch):
            if len(batch.labels) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return objective(model, batch)

        running.parallel.step.objective = running.trainer.objective = hungry

    at_step(0, starve)
    found = cli("train", text, *SMALL, "--batch-size", 8, "--out", tmp_path / "run")
    refused(found, "batch_size = 8 does not fit", "batch_size = 2 and accumulate = 4 make the same")


def test_weights_that_are_no_numbers(cli, text, tmp_path, at_step, monkeypatch):
    def break_it(running):
        with torch.no_grad():
            next(iter(running.model.parameters()))[0] = float("nan")

    at_step(3, break_it)
    found = cli("train", text, *SMALL, "--out", tmp_path / "run")
    refused(found, "is no longer finite", "resume from the last checkpoint")
    monkeypatch.undo()
    assert cli("train", "--out", tmp_path / "run", "--resume").code == 0
