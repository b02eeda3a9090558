import json
from pathlib import Path

import pytest

from polyhead.cli import eval as module
from polyhead.tasks.evaluate.scorer import MOST_TOKENS

ROWS = [
    {"question": f"the quick brown {word}", "choices": ["fox", "lazy dog", "jumps"], "answer": 0}
    for word in ("fox", "dog", "the", "over", "lazy", "jumps")
]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    asks = [{"question": row["question"], "answer": "fox"} for row in ROWS]
    (tmp_path / "asks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asks))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return tmp_path


ALL = ("perplexity=text.txt", "choices=quiz.jsonl", "match=asks.jsonl")


def test_all_kinds_as_a_table_and_as_json(cli, plain, files):
    ran = cli("eval", plain, "--tasks", *ALL, "--max-new-tokens", 3)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split()[:3] == ["task", "metric", "value"]
    shown = [line.split()[:2] for line in lines[1:]]
    metrics = ["perplexity", "bits_per_byte", "loss", "accuracy", "accuracy_norm", "exact_match"]
    of = [ALL[0]] * 3 + [ALL[1]] * 2 + [ALL[2]]
    assert shown == [list(pair) for pair in zip(of, metrics, strict=True)]
    assert "windows of one document" in ran.out
    said = cli("eval", plain, "--tasks", *ALL, "--max-new-tokens", 3, "--json")
    (model,) = json.loads(said.out)["models"]
    assert model["model"] == str(plain)
    figures = model["tasks"]["choices=quiz.jsonl"]
    assert figures["samples"] == 6
    accuracy = figures["metrics"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]


def test_two_models_side_by_side(cli, plain, chatty, files):
    ran = cli("eval", plain, chatty, "--tasks", "choices=quiz.jsonl", "--out", "out")
    assert ran.code == 0
    assert ran.out.splitlines()[0].split()[2:5] == ["first", "second", "difference"]
    said = json.loads((files / "out" / "results.json").read_text())
    assert len(said["models"]) == 2
    assert [one["metric"] for one in said["differences"]] == ["accuracy", "accuracy_norm"]
    assert len(list((files / "out").glob("*/choices.quiz.jsonl"))) == 2


def test_an_interrupted_run_says_how_to_go_on(cli, plain, files, monkeypatch):
    from polyhead.tasks.evaluate import run

    evaluate = run.evaluate

    def stopped(model, tokenizer, task, **named):
        if task.kind == "choices":
            raise KeyboardInterrupt
        return evaluate(model, tokenizer, task, **named)

    monkeypatch.setattr(run, "evaluate", stopped)
    ran = cli("eval", plain, "--tasks", *ALL, "--out", "out")
    assert ran.code == 130
    assert "out keeps every sample: run it again to go on" in ran.err
    assert "perplexity=text.txt" in ran.out
    assert "exact_match" not in ran.out
    monkeypatch.undo()
    monkeypatch.chdir(files)
    assert cli("eval", plain, "--tasks", *ALL, "--out", "out").code == 0


def test_the_same_flags_go_to_each_task_that_has_them(monkeypatch, files):
    words = ("choices=quiz.jsonl", "match=asks.jsonl", "perplexity=text.txt")
    args = module.Args(
        models=("m",),
        tasks=words,
        shots=2,
        prompt=r"Q: {question}\nA:",
        stop=(r"\n",),
        columns=("question=question", "text=body"),
        context=7,
    )
    choices, match, perplexity = module._tasks(args, words)
    assert choices.prompt == match.prompt == "Q: {question}\nA:"
    assert (choices.shots, match.shots, match.stop) == (2, 2, ("\n",))
    assert perplexity.context == 7
    assert perplexity.columns == {"text": "body"}
    assert choices.columns == match.columns == {"question": "question"}


def test_what_was_cut_is_said(cli, plain, files):
    row = {**ROWS[0], "question": "the quick brown fox. " * 100}
    (files / "long.jsonl").write_text(json.dumps(row) + "\n")
    ran = cli("eval", plain, "--tasks", "choices=long.jsonl")
    assert ran.code == 0
    assert "of 1 of 1 prompts the beginning was not read: the model takes 128 tokens" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tasks", "choices=quiz.jsonl"), "0 models; name one, or two"),
        (("a", "b", "c", "--tasks", "choices=quiz.jsonl"), "3 models"),
        (("a",), "there is no task"),
        (("a", "--tasks", "choices=no.jsonl"), "no.jsonl is no file"),
        (("a", "--tasks", "guess=quiz.jsonl"), "'guess' is none of"),
        (("a", "--tasks", "choices=quiz.jsonl", "--stop", "x"), "--stop is not for choices=quiz"),
        (("a", "--tasks", "match=asks.jsonl", "--stride", "2"), "--stride is not for match="),
        (("a", "--tasks", "match=asks.jsonl", "--columns", "text=x"), "--columns text is not for"),
        (("a", "--tasks", "match=asks.jsonl", "--columns", "answer"), "write NAME="),
        (("a", "--tasks", "match=asks.jsonl", "--out", "text.txt"), "text.txt is a file"),
    ],
)
def test_what_cannot_be_is_one_line(cli, files, words, message):
    ran = cli("eval", *words)
    assert ran.code == 2
    assert message in ran.err
    assert len(ran.err.splitlines()) == 1
    assert ran.out == ""


@pytest.mark.parametrize(
    ("there", "flags", "message"),
    [
        (None, (), "'hellaswag' is a task of lm-eval, which is not installed"),
        ("spec", ("--include-path", "none"), "none is no directory"),
    ],
)
def test_tasks_of_lm_eval_are_looked_at_first(cli, files, monkeypatch, there, flags, message):
    monkeypatch.setattr("polyhead.tasks.evaluate.harness.find_spec", lambda name: there)
    ran = cli("eval", "no-such-model", "--tasks", "hellaswag,arc_easy", *flags)
    assert ran.code == 2
    assert message in ran.err


def test_a_directory_of_another_evaluation(cli, plain, files):
    start = ("eval", plain, "--tasks", "choices=quiz.jsonl", "--out", "out")
    assert cli(*start).code == 0
    ran = cli(*start, "--shots", 1)
    assert ran.code == 2
    assert "another evaluation (settings)" in ran.err
    assert cli(*start, "--shots", 1, "--force").code == 0


def test_help_has_examples_and_the_librarys_default(cli):
    assert module.Args(("m",)).batch_tokens == MOST_TOKENS
    ran = cli("eval", "--help")
    assert ran.code == 0
    assert "polyhead eval smollm2-135m --tasks" in ran.out
