"""docs/adding.md, followed to the letter on a copy of the sources."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- (file: (\S+)|after the steps) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def apply(path: Path, diff: str) -> None:
    """A hunk without line numbers: what it leaves and takes away stands in the file once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} does not hold once:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A copy with the steps done, and what the page says to run after them."""
    copy = tmp_path_factory.mktemp("added")
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", copy)
    after = []
    page = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    for _, name, language, body in BLOCK.findall(page):
        if not name:
            after.append((language, body))
        elif language == "diff":
            apply(copy / name, body)
        else:
            assert not (copy / name).exists(), f"{name} is there already"
            (copy / name).write_text(body, encoding="utf-8")
    return copy, after


def run(copy: Path, *words: str) -> str:
    paths = os.pathsep.join((str(copy / "src"), str(copy)))
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_new_family_works(added: tuple[Path, list[tuple[str, str]]]) -> None:
    copy, after = added
    (script,) = [body for language, body in after if language == "python"]
    told = run(copy, "-c", script)
    assert "[2, 9, 100]" in told


def test_it_gives_transformers_numbers(added: tuple[Path, list[tuple[str, str]]]) -> None:
    copy, after = added
    (command,) = [body for language, body in after if language == "console"]
    words = shlex.split(shlex.split(command)[2].removeprefix("ARGS="))
    told = run(copy, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *words)
    assert told.count("PASSED") >= 3 * 6
    assert "SKIPPED" not in told


def test_it_keeps_the_style(added: tuple[Path, list[tuple[str, str]]]) -> None:
    copy, _ = added
    names = [name for _, name, _, _ in BLOCK.findall((ROOT / "docs" / "adding.md").read_text())]
    files = [name for name in dict.fromkeys(names) if name]
    run(copy, "-m", "ruff", "check", *files)
    run(copy, "-m", "ruff", "format", "--check", *files)
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_floors.py")
