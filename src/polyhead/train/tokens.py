"""Tokens on disk, memory-mapped: one file, or several that are read as one.

A folder of tokens holds `tokens.bin` (uint16, or uint32 for a vocabulary above 65536) beside
`documents.bin` (int64, where each document ends) and `header.json`, and is there whole or not at
all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from polyhead.errors import DataError
from polyhead.files.disk import sync_directory

Piece = tuple[str, bool]
"""Text, and whether a document ends with it."""
Progress = Callable[[int, int], None]
"""Called with what is done and all there is (bytes, characters or rows; 0 where not known)."""

TOKENS, DOCUMENTS, HEADER = "tokens.bin", "documents.bin", "header.json"
PREPARED = "prepared.json"  # what a directory of shards is known by


class Joined:
    """Arrays end to end, read as one [N]: nothing is copied but what is asked for."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts, self.dtype = parts, parts[0].dtype
        self.firsts = np.array([0, *accumulate(map(len, parts))])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, at: Any) -> "Ids":
        """A stretch as a view, places [...] as an array."""
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            assert step == 1, "stretches have no gaps"
            begins = self.firsts[:-1].tolist()
            pairs = zip(begins, self.parts, strict=True)
            return joined([part[max(0, first - b) : max(0, last - b)] for b, part in pairs])
        places = np.asarray(at)
        owners = np.searchsorted(self.firsts, places, side="right") - 1
        found = np.empty(places.shape, self.dtype)
        for owner in np.unique(owners).tolist():
            here = owners == owner
            found[here] = self.parts[owner][places[here] - self.firsts[owner]]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts, dtype=dtype, casting="unsafe")

    def max(self, initial: int = 0) -> int:
        """The highest value, or `initial`."""
        return max(int(part.max(initial=initial)) for part in self.parts)

    def tolist(self) -> list[int]:
        """All values."""
        return [value for part in self.parts for value in part.tolist()]


Ids = np.ndarray | Joined


def joined(parts: Sequence[np.ndarray]) -> Ids:
    """Arrays end to end; one that has all is it."""
    filled = [part for part in parts if len(part)] or list(parts[:1])
    return filled[0] if len(filled) == 1 else Joined(filled)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stretch of a corpus: ids (memory-mapped, read-only) and how many bytes they stand for.

    ends: where each document ends, its closing token included; rising, the last at the end of
    `ids`. None where that is not known.
    """

    ids: Ids
    text_bytes: int
    digest: str
    ends: np.ndarray | None = None

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for, on average."""
        return self.text_bytes / max(1, len(self.ids))

    def split(self, held_out: int, tokenizer: Any) -> tuple["Tokens", "Tokens"]:
        """All but the last `held_out` tokens, and those."""
        at = len(self.ids) - held_out
        tail = _text_bytes(self.ids[at:], tokenizer)
        before = after = None
        if self.ends is not None:
            before = np.append(self.ends[self.ends < at], at)
            after = self.ends[self.ends > at] - at
        return (
            Tokens(self.ids[:at], max(0, self.text_bytes - tail), f"{self.digest}[:{at}]", before),
            Tokens(self.ids[at:], tail, f"{self.digest}[{at}:]", after),
        )


@dataclass(frozen=True, eq=False)
class Encoded:
    """Pieces as tokens: ids [T], where documents end among them, and how many bytes they were."""

    ids: np.ndarray
    ends: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class Encoder:
    """Pieces to tokens, each document closed by `end` where that is an id.

    encode: texts to their ids, without special tokens. Ids of `vocab_size` or more raise DataError.
    """

    encode: Callable[[list[str]], Sequence[list[int]]]
    end: int | None
    vocab_size: int
    dtype: str

    def __call__(self, pieces: Sequence[Piece]) -> Encoded:
        rows = self.encode([text for text, _ in pieces])
        if self.end is not None:
            pairs = zip(rows, pieces, strict=True)
            rows = [[*row, self.end] if is_last else row for row, (_, is_last) in pairs]
        after = list(accumulate(map(len, rows), initial=0))
        ids = np.fromiter(chain.from_iterable(rows), np.int64, after[-1])
        check_ids(ids, self.vocab_size)
        ends = [at for at, (_, is_last) in zip(after[1:], pieces, strict=True) if is_last]
        size = sum(len(text.encode()) for text, _ in pieces)
        return Encoded(ids.astype(self.dtype), np.asarray(ends, np.int64), size)


class Writer:
    """A folder of tokens in the making: `add` what there is, then `finish`; else nothing is left.

    OSError comes through as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = self.text_bytes = 0
        self._ends: list[np.ndarray] = []
        self._temp = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
        shutil.rmtree(self._temp, ignore_errors=True)
        self._temp.mkdir(parents=True)
        self._file = open(self._temp / TOKENS, "wb")  # noqa: SIM115 (closed by __exit__)
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._file.close()
        finally:
            shutil.rmtree(self._temp, ignore_errors=True)

    @property
    def ends(self) -> np.ndarray:
        """Where documents have ended so far."""
        return np.concatenate([np.empty(0, np.int64), *self._ends])

    def add(self, encoded: Encoded) -> None:
        """More tokens."""
        raw = encoded.ids.tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._ends.append(encoded.ends + self.tokens)
        self.tokens += len(encoded.ids)
        self.text_bytes += encoded.text_bytes

    def digests(self) -> tuple[str, str]:
        """SHA-256 of both files."""
        return self._digest.hexdigest(), hashlib.sha256(self.ends.tobytes()).hexdigest()

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the rest, and give the folder its name; one that has it goes."""
        _sync(self._file)
        with open(self._temp / DOCUMENTS, "wb") as out:
            out.write(self.ends.tobytes())
            _sync(out)
        with open(self._temp / HEADER, "w", encoding="utf-8") as out:
            json.dump(header, out)
            _sync(out)
        sync_directory(self._temp)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.replace(self._temp, self.folder)
        sync_directory(self.folder.parent)


def dtype_for(vocab_size: int) -> str:
    """The smallest type of an id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def open_folder(
    folder: Path, dtype: str, tokens: int, documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, memory-mapped, and where documents end. ValueError for files of another length."""
    path = folder / TOKENS
    ends = np.fromfile(folder / DOCUMENTS, dtype=np.int64)
    if path.stat().st_size != tokens * np.dtype(dtype).itemsize or len(ends) != documents:
        raise ValueError(tokens)
    if tokens == 0:  # which cannot be mapped
        return np.empty(0, dtype), ends
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,)), ends


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a directory that `polyhead prepare` made or began."""
    return os.path.isfile(os.path.join(path, PREPARED))


def check_ids(ids: Ids, vocab_size: int) -> None:
    """DataError unless every id is below `vocab_size`."""
    highest = int(ids.max(initial=0))
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer gave id {highest} but the model has a vocabulary of {vocab_size}: "
            "use the model's own tokenizer, or a model with a larger vocab_size"
        )


def end_id(tokenizer: Any) -> int | None:
    """What closes a document, if anything."""
    return tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells tokenizers apart: all they know, as JSON, and how documents end."""
    known = f"{tokenizer.backend.to_str()} {end_id(tokenizer)}"
    return hashlib.sha256(known.encode("utf-8", "replace")).hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _text_bytes(ids: Ids, tokenizer: Any) -> int:
    """Bytes of UTF-8 that ids stand for, special tokens not counted."""
    size = 0
    for start in range(0, len(ids), 1 << 16):
        part = ids[start : start + (1 << 16)].tolist()
        size += len(tokenizer.decode(part, skip_special_tokens=True).encode("utf-8", "replace"))
    return size
