"""Every example in the README and the docs runs."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import save_model
from tests.tasks.test_images import clip, pictures, vision
from tests.tasks.test_translate import make as translator
from tests.tasks.tiny import make

import polyhead as ph
from polyhead.cli.main import main
from polyhead.train.registry import OBJECTIVES

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)

OF_ADDING = ("file: ", "after the steps")  # tests/test_adding.py follows these

POSTS = (("a fine day", "good"), ("what a mess", "bad"), ("so good", "good"), ("no more", "bad"))


def blocks(language: str) -> list[object]:
    """The fenced blocks of a language, each with the note that stands before it."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for note, fence, body in BLOCK.findall(text):
            line = text[: text.index(body)].count("\n")
            if fence == language and not note.startswith(OF_ADDING):
                found.append(pytest.param(note, body, id=f"{path.name}:{line}"))
    return found


@pytest.mark.parametrize(("note", "body"), blocks("python"))
def test_python(
    note: str,
    body: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    if note.startswith("needs: "):
        fixtures = {"weights": "smollm2", "ranks": "torchrun"}
        needed = fixtures.get(note[7:], note[7:])
        there = request.getfixturevalue(needed)
        if needed in ("tiny", "quiz"):
            monkeypatch.chdir(there)
    exec(compile(body, "example", "exec"), {})


@pytest.mark.parametrize(("note", "body"), blocks("console"))
def test_commands(
    note: str,
    body: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    commands = [shlex.split(line, comments=True) for line in body.splitlines()]
    assert all(words[0] in ("polyhead", "make") for words in commands)
    stands = note[5:] in ("tiny", "quiz")
    monkeypatch.chdir(request.getfixturevalue(note[5:]) if stands else tmp_path)
    if note in ("run: table", "run: tasks"):
        rows = [f"{text}\t{label}" for text, label in POSTS * 10]
        (tmp_path / "posts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    if note == "run: tasks":
        (tmp_path / "tasks.toml").write_text(_toml("head = "))
        row = json.dumps({"words": ["Ada", "lives"], "kinds": ["B-PER", "O"]})
        (tmp_path / "names.jsonl").write_text(f"{row}\n" * 20)
    if note == "run: corpus":
        (tmp_path / "book.txt").write_text("the cat sat on a mat and saw a bat. " * 60)
    if note == "run: ladder":
        words = "".join(f"The word {i} is a long line, number {i * i}.\n\n" for i in range(90))
        (tmp_path / "text.txt").write_text(words)
    if note == "run: blend":
        (tmp_path / "mix.toml").write_text(_toml("weight = "))
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "a.txt").write_text("for a in b: print(a)\n" * 60)
        (tmp_path / "books.jsonl").write_text(f"{json.dumps({'text': 'a cat sat. ' * 60})}\n")
    for words in commands:
        if note.startswith("run"):
            assert main(words[1:]) == 0, words


def _toml(holding: str) -> str:
    """The TOML file of docs/training.md that holds a text."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (found,) = [
        body for _, fence, body in BLOCK.findall(page) if fence == "toml" and holding in body
    ]
    return found


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells one process of one."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the models of docs/tasks.md stand, small and untaught."""
    folder = tmp_path_factory.mktemp("tiny")
    runs = folder / "runs"
    make(runs / "mood", "classify", labels=("bad", "good"))
    make(runs / "names", "tag", labels=("O", "B-PER", "I-PER"))
    make(runs / "squad", "answer")
    make(runs / "bert", "lm")
    make(runs / "vectors", "none")
    story(runs / "story")
    (folder / "prompts.txt").write_text("once upon a time\nonce\n")
    asked = [{"prompt": "once", "id": "q1"}, {"prompt": "time", "temperature": 0, "topic": "t"}]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    translator(runs / "en-es")
    vision(runs / "vit")
    clip(runs / "clip")
    for name, path in zip(("cat.png", "dog.png"), pictures(folder, 2), strict=True):
        Path(path).rename(folder / name)
    return folder


def story(path: Path) -> None:
    """A small untaught GPT-2 over bytes, whose head has a few tokens more."""
    torch.manual_seed(0)
    tokenizer = ph.Tokenizer.train(["once upon a time"], kind="bytes")
    shape = dict(d_model=32, num_layers=2, num_heads=4, max_seq_len=512)
    ph.build("gpt2", vocab_size=tokenizer.vocab_size + 6, **shape).save(path)
    tokenizer.save(path)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A folder where the models and files of docs/evaluation.md stand, small and untaught."""
    save_model(tmp_path / "runs" / "gpt", None)
    save_model(tmp_path / "runs" / "other", None, seed=1)
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    rows = [{"question": f"the {word}", "choices": ["fox", "lazy dog"], "answer": 0, "n": number}
            for number, word in enumerate("quick brown fox jumps over lazy".split())]  # fmt: skip
    (tmp_path / "quiz.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asks = [{"question": row["question"], "answer": ["fox", "dog"]} for row in rows]
    (tmp_path / "asks.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asks))
    return tmp_path


def test_the_table_of_objectives_has_every_name_column_and_option() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert rows.keys() == OBJECTIVES.keys()
    for name, kind in OBJECTIVES.items():
        said = rows["masked-lm"] if "as `masked-lm`" in rows[name] else rows[name]
        options = {**kind.dataset_options, **kind.loss_options}
        for option, value in options.items():
            assert f"`{option}={json.dumps(value).strip(chr(34))}`" in said, (name, option)
        for column in kind.columns:
            assert f"`{column}`" in said, (name, column)
        if kind.head:
            assert f"`{kind.head}`" in rows[name], name
