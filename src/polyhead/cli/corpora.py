"""Text to train on: files, folders, and the corpora that every Python brings along."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from polyhead.errors import DataError
from polyhead.train.hf import is_name

EMBEDDED = ("pydocs", "stdlib")
# Their text is data or not meant to be read.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "__pycache__",
    "idlelib",
    "pydoc_data",
}


@dataclass(frozen=True)
class SplitText:
    """Text to learn from and text to be judged by, which share no long line."""

    train: str
    held_out: str


def corpus(name: str) -> str | list[str]:
    """What `Trainer.fit` takes: the texts of an embedded corpus, or the path as it is.

    "pydocs": Python's own documentation of its language. "stdlib": the standard library's sources.
    """
    if name == "pydocs":
        return [pydocs()]
    if name == "stdlib":
        return stdlib()
    if not is_name(name) and not Path(name).exists():
        raise DataError(
            f"no such file or folder: {name}; name a text, a table, a folder of them, a dataset as "
            f"hf:NAME, or one of {', '.join(EMBEDDED)}"
        )
    return name


def pydocs() -> str:
    """The topics of `pydoc_data`, one after the other (about 465 KB)."""
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip("\n") for text in topics.values()) + "\n"


def stdlib() -> list[str]:
    """The standard library's sources without its tests, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts)
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    if not (found := [text for text in texts if text.strip()]):
        raise DataError(f"no sources in {root}; train on a text file instead")
    return found


def split(text: str, held_out: float = 0.1, most: int = 1 << 18) -> SplitText:
    """The last part of a text, and the rest without the lines that repeat there.

    held_out: a share of the characters, `most` at most; more, up to the break between paragraphs,
    lines or words that lies before.
    """
    at = max(int(len(text) * (1 - held_out)), len(text) - most)
    earliest = 2 * at - len(text)
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, max(0, earliest), at)
        if found >= 0:
            at = found + len(mark)
            break
    return SplitText(without_lines_of(text[:at], text[at:]), text[at:])


def without_lines_of(text: str, held_out: str, shortest: int = 20) -> str:
    """`text` without the lines that also stand in `held_out`, so that nothing of it is learned.

    Lines below `shortest` characters stay: they are what all texts share.
    """
    seen = {line.strip() for line in held_out.split("\n")}
    kept = (
        line
        for line in text.split("\n")
        if len(line.strip()) < shortest or line.strip() not in seen
    )
    return "\n".join(kept)
