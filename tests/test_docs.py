"""Every example in the README and the docs runs."""

import re
import shlex
from pathlib import Path

import pytest

from polyhead.cli.main import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


POSTS = (("a fine day", "good"), ("what a mess", "bad"), ("so good", "good"), ("no more", "bad"))


def blocks(language: str) -> list[object]:
    """The fenced blocks of a language, each with the note that stands before it."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for note, fence, body in BLOCK.findall(text):
            line = text[: text.index(body)].count("\n")
            if fence == language:
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
    if note.startswith("needs: "):
        request.getfixturevalue({"weights": "smollm2", "minilm": "minilm"}[note[7:]])
    monkeypatch.chdir(tmp_path)
    exec(compile(body, "example", "exec"), {})


@pytest.mark.parametrize(("note", "body"), blocks("console"))
def test_commands(note: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [shlex.split(line, comments=True) for line in body.splitlines()]
    assert all(words[0] in ("polyhead", "make") for words in commands)
    monkeypatch.chdir(tmp_path)
    if note == "run: table":
        rows = [f"{text}\t{label}" for text, label in POSTS * 10]
        (tmp_path / "posts.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    for words in commands:
        if note.startswith("run"):
            assert main(words[1:]) == 0, words
