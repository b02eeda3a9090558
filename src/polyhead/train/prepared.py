"""A directory of tokens that `polyhead prepare` made: shards, and what is said of them.

DIR/shard-00000/   tokens.bin, documents.bin, header.json      (train/tokens.py)
DIR/tokenizer.json …                                           the tokenizer they are of
DIR/prepared.json  the plan of the shards, and, when all are there, what they hold
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyhead.errors import DataError, FileError
from polyhead.files.disk import atomic_file
from polyhead.train.tokens import PREPARED, Tokens, check_ids, joined, open_folder, tokenizer_digest

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What shards depend on, beside the texts. tokenizer: its digest; piece: characters at once."""

    format: int
    tokenizer: str
    vocab_size: int
    dtype: str
    shard_tokens: int
    piece: int


@dataclass(frozen=True)
class Shard:
    """What one shard holds. groups: of pieces it was made from; texts: the SHA-256 of all the text
    from the first shard's to the end of this one's; the others are of its files."""

    tokens: int
    text_bytes: int
    documents: int
    groups: int
    texts: str
    tokens_sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class Prepared:
    """A directory of tokens. shards: all of them; None while some are missing."""

    plan: Plan
    shards: tuple[Shard, ...] | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(shard.tokens for shard in self.shards or ())

    @property
    def documents(self) -> int:
        """How many there are."""
        return sum(shard.documents for shard in self.shards or ())

    @property
    def text_bytes(self) -> int:
        """The text they were, in UTF-8."""
        return sum(shard.text_bytes for shard in self.shards or ())

    @property
    def digest(self) -> str:
        """What tells it from other texts and tokenizers, however it is cut into shards."""
        return f"{self.shards[-1].texts} {self.plan.tokenizer}" if self.shards else ""

    def save(self, folder: Path) -> None:
        """Write prepared.json."""
        shards = None if self.shards is None else [asdict(shard) for shard in self.shards]
        said = {"plan": asdict(self.plan), "shards": shards}
        with atomic_file(folder / PREPARED) as file:
            file.write(json.dumps(said, indent=1).encode() + b"\n")


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}"


def read_prepared(folder: Path) -> Prepared:
    """What prepared.json says. FileError where it cannot be read."""
    try:
        said = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        shards = said["shards"]
        plan = Plan(**said["plan"])
        made = None if shards is None else tuple(Shard(**shard) for shard in shards)
    except (OSError, ValueError, TypeError, KeyError):
        raise FileError(f"{folder / PREPARED} cannot be read: prepare it anew") from None
    if plan.format != FORMAT:
        raise FileError(f"{folder} has format {plan.format}, not {FORMAT}: prepare it anew")
    return Prepared(plan, made)


def open_prepared(folder: Path, tokenizer: Any, vocab_size: int) -> Tokens:
    """All shards as one corpus, memory-mapped. FileError for what is not whole; DataError for
    another tokenizer, and ids of `vocab_size` or more."""
    found = read_prepared(folder)
    if found.plan.tokenizer != tokenizer_digest(tokenizer):
        raise DataError(
            f"{folder} was prepared with another tokenizer: use the one it holds, or prepare the "
            "texts anew with yours"
        )
    if found.shards is None:
        raise FileError(f"{folder} is not finished: the same polyhead prepare goes on with it")
    opened = [_open(folder, n, found.plan.dtype, shard) for n, shard in enumerate(found.shards)]
    ids = joined([ids for ids, _ in opened])
    if found.plan.vocab_size > vocab_size:
        check_ids(ids, vocab_size)
    return Tokens(ids, found.text_bytes, found.digest, _ends(found.shards, opened))


def _open(folder: Path, number: int, dtype: str, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    path = shard_path(folder, number)
    try:
        return open_folder(path, dtype, shard.tokens, shard.documents)
    except (OSError, ValueError):
        raise FileError(
            f"{path} is missing or cut short: the same polyhead prepare makes it again"
        ) from None


def _ends(shards: Sequence[Shard], opened: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Where documents end among all tokens."""
    before = np.cumsum([0, *(shard.tokens for shard in shards)])
    return np.concatenate([ends + at for (_, ends), at in zip(opened, before, strict=False)])
