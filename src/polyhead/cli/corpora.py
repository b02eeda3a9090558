"""Text to train on: files, folders, and the corpora that every Python brings along."""

import sysconfig
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
