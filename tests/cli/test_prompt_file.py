"""`polyhead generate --file`, from outside."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from polyhead.cli.settings import GROUPS, Settings, config_of
from polyhead.generate.config import GenerationConfig

FEW = ("--max-new-tokens", 6, "--seed", 1)
ROOT = Path(__file__).parents[2]
# So slow that a signal comes in time, and heard where whoever runs the tests ignores it.
SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from polyhead.cli.main import main
from polyhead.generate.engine import Engine
step = Engine.step
Engine.step = lambda self: (time.sleep(0.03), step(self))[1]
sys.exit(main())
"""


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"q{n}", "prompt": word} for n, word in enumerate("the quick brown fox".split())]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_to_answers(cli, plain, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    found = cli("generate", plain, "--file", asked, "--out", out, *FEW)
    assert (found.code, found.out) == (0, "")
    assert found.err.startswith(f"{out}: 4 answers; 24 tokens in ")
    rows = read(out)
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3"]
    said = cli("generate", plain, *(row["prompt"] for row in rows), "--json", *FEW).out
    for row, line in zip(rows, said.splitlines(), strict=True):
        assert json.loads(line).items() <= row.items()
    before = out.read_bytes()
    again = cli("generate", plain, "--file", asked, "--out", out, "--json", *FEW)
    assert json.loads(again.out) == {
        "out": str(out), "prompts": 4, "done": 4, "failed": 0, "tokens": 0, "seconds": 0.0,
        "tokens_per_second": 0.0,
    }  # fmt: skip
    other = cli("generate", plain, "--file", asked, "--out", out, "--top-k", 3, *FEW)
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "of another run (top_k)" in other.err
    assert out.read_bytes() == before
    forced = cli("generate", plain, "--file", asked, "--out", out, "--top-k", 3, "--force", *FEW)
    assert forced.code == 0
    assert out.read_bytes() != before


def test_an_answer_that_failed_is_said(cli, plain, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    with asked.open("a") as file:
        file.write(json.dumps({"prompt": "lazy dog " * 200}) + "\n")
    for _ in range(2):
        found = cli("generate", plain, "--file", asked, "--out", out, *FEW)
        assert found.code == 1
        assert "5 answers, 1 of them errors;" in found.err
    assert "shorten it" in read(out)[4]["error"]
    asked.write_text(asked.read_text().splitlines()[-1])
    assert "all were there" not in cli("generate", plain, "--file", asked, *FEW).err


def test_without_a_place_answers_go_to_standard_output(cli, plain, monkeypatch):
    raw = io.BytesIO(b"the quick\nl\xc3\xa9zy dog\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    found = cli("generate", plain, "--file", "-", *FEW)
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert sorted((row["line"], row["prompt"]) for row in rows) == [
        (1, "the quick"),
        (2, "lézy dog"),
    ]
    assert "lézy" in found.out
    assert "2 answers; " in found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x", "--file", "FILE"), "--file and prompts on the command line"),
        (("--file", "FILE", "--stream"), "--file and --stream"),
        (("--file", "no.txt"), "cannot read no.txt"),
        (("--file", "FILE", "--out", "FILE"), "is the file of prompts"),
        (("--file", "FILE", "--out", "FILE", "--force"), "is the file of prompts"),
        (("--file", "FILE", "--rows", "0"), "rows=0 must be 1 or more"),
        (("--file", "FILE", "--system", "x"), "needs a chat template"),
        (("--file", "FILE", "--temperature", "-1"), "temperature=-1.0 must be"),
        (("x", "--out", "FILE"), "are for a file of prompts; give --file"),
        (("x", "--force"), "are for a file of prompts; give --file"),
        (("x", "--rows", "3"), "are for a file of prompts; give --file"),
        ((), "there is no prompt"),
    ],
)
def test_what_does_not_go_together(cli, plain, asked, words, said):
    before = asked.read_bytes()
    found = cli("generate", plain, *(asked if word == "FILE" else word for word in words))
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert said in found.err
    assert asked.read_bytes() == before


def test_several_texts_of_a_prompt(cli, plain):
    words = ("generate", plain, "the", "--num-return-sequences", 3, *FEW)
    (row,) = (json.loads(line) for line in cli(*words, "--json").out.splitlines())
    assert len({each["text"] for each in row["texts"]}) == 3
    assert cli(*words).out == "".join(f"{each['text']}\n" for each in row["texts"])


@pytest.mark.skipif(os.name == "nt", reason="there are no such terminals")
def test_progress_stays_out_of_the_answers(plain, asked):
    terminal, side = os.openpty()
    command = [sys.executable, "-m", "polyhead.cli.main", "generate", str(plain), "--file", asked]
    process = subprocess.Popen(
        [*command, *map(str, FEW)], stdout=subprocess.PIPE, stderr=side, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "xterm"},
    )  # fmt: skip
    out = process.communicate(timeout=120)[0]
    os.write(side, b"<end>")
    said = b""
    while not said.endswith(b"<end>"):  # a terminal gives a page at a time
        said += os.read(terminal, 1 << 16)
    said = said.decode()
    os.close(side)
    os.close(terminal)
    assert sorted(json.loads(line)["line"] for line in out.splitlines()) == [1, 2, 3, 4]
    assert "4 of 4" in said
    assert "tokens/s" in said


@pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")
def test_it_goes_on_after_signals(cli, plain, tmp_path):
    asked, whole, out = (tmp_path / name for name in ("p.txt", "whole.jsonl", "out.jsonl"))
    asked.write_text("the quick\nbrown fox\n" * 30)
    words = ["generate", str(plain), "--file", str(asked), "--rows", "4", "--max-new-tokens", "40"]
    words += ["--ignore-eos", "--seed", "3"]
    assert cli(*words, "--out", whole).code == 0
    told = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *words, "--out", str(out)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
        there = _lines(out)
        deadline = time.monotonic() + 60
        while _lines(out) < there + 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        told[number] = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert there < _lines(out) < 60
    assert f"stopped; {out} keeps " in told[signal.SIGINT]
    assert " of 60 answers: the same command goes on" in told[signal.SIGINT]
    assert cli(*words, "--out", out).code == 0
    assert out.read_bytes() == whole.read_bytes()


def _lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_every_setting_is_an_option_in_one_group(cli):
    known = {item.name for item in fields(GenerationConfig)}
    grouped = [name for _, names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert known - set(grouped) == {"trie"}
    assert config_of(Settings()) == GenerationConfig()
    for verb in ("generate", "chat"):
        said = cli(verb, "--help").out
        places = [said.index(f" {group} options ") for group in GROUPS]
        assert places == sorted(places)
        for name in grouped:
            flag = name.replace("_", "-")
            assert f" --{flag} " in said or f" --no-{flag} " in said, name
        assert "How long a text is, and what ends it." in said
        assert "Draw from the k most likely tokens" in said
