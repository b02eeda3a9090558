"""Corpora as memory-mapped tokens, made once and kept.

Sources: a list of strings, a text file, a .jsonl file (field `text`), or a folder of .txt and
.jsonl files. Tokens are kept as `tokens.bin` (uint16, or uint32 for a vocabulary above 65536)
beside `documents.bin` (int64, where each document ends) and `header.json`, in a folder named by
the hash of the contents and of the tokenizer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyhead.errors import DataError, FileError

Source = str | os.PathLike[str] | Iterable[str]
_Kept = str | os.PathLike[str] | Sequence[str]
Progress = Callable[[int, int], None]
"""Called with (characters done, characters in all; 0 where that is not known)."""

PIECE = 1 << 20  # characters tokenised at once
_SHOWN = 60
_FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What `header.json` says of `tokens.bin`. `text_bytes` counts the text in UTF-8."""

    format: int
    dtype: str
    tokens: int
    text_bytes: int
    documents: int
    vocab_size: int
    digest: str


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stretch of a corpus: ids (memory-mapped, read-only) and how many bytes they stand for.

    ends: where each document ends, its closing token included; rising, the last at the end of
    `ids`. None where that is not known.
    """

    ids: np.ndarray
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


def load_tokens(
    source: Source,
    tokenizer: Any,
    cache: Path,
    *,
    vocab_size: int,
    progress: Progress | None = None,
) -> Tokens:
    """Tokens of a corpus, from `cache` if they are there, else made and kept there.

    Documents end with the tokenizer's `eos_id`, or else its `sep_id`, where it has one. An empty
    corpus and ids of `vocab_size` or more raise DataError.
    """
    source = kept(source)
    digest = _digest(source, tokenizer)
    folder = Path(cache) / digest[:32]
    # Folders of the first release say nothing of documents; their tokens are the same.
    if not all((folder / name).exists() for name in ("header.json", "documents.bin")):
        _write(folder, source, tokenizer, digest, vocab_size, progress)
    path = folder / "tokens.bin"
    try:
        header = Header(**json.loads((folder / "header.json").read_text()))
        ends = np.fromfile(folder / "documents.bin", dtype=np.int64)
        size = header.tokens * np.dtype(header.dtype).itemsize
        whole = path.stat().st_size == size and len(ends) == header.documents
        if not whole or header.digest != digest:
            raise ValueError(size)
    except (OSError, ValueError, TypeError):
        raise FileError(
            f"{folder} does not hold the tokens its header speaks of: remove it"
        ) from None
    ids = np.memmap(path, dtype=header.dtype, mode="r", shape=(header.tokens,))
    if header.vocab_size > vocab_size:
        check_ids(ids, vocab_size)
    return Tokens(ids, header.text_bytes, digest, ends)


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """DataError unless every id is below `vocab_size`."""
    highest = int(ids.max(initial=0))
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer gave id {highest} but the model has a vocabulary of {vocab_size}: "
            "use the model's own tokenizer, or a model with a larger vocab_size"
        )


def documents(source: Source) -> Iterator[str]:
    """The documents of a source, whole, one after the other."""
    text: list[str] = []
    for piece, ends in _pieces(source):
        text.append(piece)
        if ends:
            yield "".join(text)
            text.clear()


def kept(source: Source) -> _Kept:
    """A source that can be read more than once."""
    if isinstance(source, str | os.PathLike | Sequence):
        return source
    try:
        return list(source)
    except TypeError:
        kind = type(source).__name__
        raise DataError(f"a corpus is a path or a list of str, not a {kind}") from None


def _write(
    folder: Path,
    source: _Kept,
    tokenizer: Any,
    digest: str,
    vocab_size: int,
    progress: Progress | None,
) -> None:
    """Tokenise piece by piece into a temporary folder, then rename it to `folder`."""
    temp = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temp, ignore_errors=True)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    end = _end_id(tokenizer)
    tokens = text_bytes = done = 0
    ends: list[int] = []
    # Progress is told in bytes of files, in characters of a list.
    in_files = isinstance(source, str | os.PathLike)
    total = sum(p.stat().st_size for p in files(source)) if in_files else sum(map(len, source))
    try:
        temp.mkdir(parents=True)
        with open(temp / "tokens.bin", "wb") as out:
            for pieces in _groups(_pieces(source)):
                texts = [text for text, _ in pieces]
                rows = tokenizer.encode_batch(texts, add_special_tokens=False)
                for row, (text, is_last) in zip(rows, pieces, strict=True):
                    ids = [*row, end] if is_last and end is not None else row
                    array = np.asarray(ids, dtype=np.int64)
                    check_ids(array, vocab_size)
                    out.write(array.astype(dtype).tobytes())
                    size = len(text.encode())
                    tokens, text_bytes = tokens + len(ids), text_bytes + size
                    ends += [tokens] if is_last else []
                    done += size if in_files else len(text)
                if progress:
                    progress(min(done, total), total)
            _sync(out)
        if text_bytes == 0:
            raise DataError(f"the corpus is empty ({_name(source)}): give it text to learn from")
        with open(temp / "documents.bin", "wb") as out:
            out.write(np.asarray(ends, dtype=np.int64).tobytes())
            _sync(out)
        header = Header(_FORMAT, dtype.name, tokens, text_bytes, len(ends), vocab_size, digest)
        with open(temp / "header.json", "w") as out:
            json.dump(asdict(header), out)
            _sync(out)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temp, folder)
    except OSError as error:
        raise FileError(f"cannot keep tokens in {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _end_id(tokenizer: Any) -> int | None:
    """What closes a document, if anything."""
    return tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _name(source: _Kept) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else f"{len(source)} texts"


def files(source: str | os.PathLike[str]) -> list[Path]:
    """The files a path stands for: itself, or every .txt and .jsonl below it, sorted."""
    path = Path(source)
    # os.path answers where pathlib raises: for a text that is too long to be a name.
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        name = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}…"
        raise DataError(f"no such file or folder: {name!r}; for a text itself pass a list of texts")
    found = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
    if not found:
        raise DataError(f"no .txt or .jsonl file in {path}: put the corpus there")
    return found


def _pieces(source: Source) -> Iterator[tuple[str, bool]]:
    """(text, does a document end here), of about PIECE characters at most."""
    if not isinstance(source, str | os.PathLike):
        for text in source:
            yield from _cut([text])
        return
    for path in files(source):
        yield from _jsonl(path) if path.suffix == ".jsonl" else _text(path)


def _groups(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces together until they make PIECE characters: tokenizers are faster on many at once."""
    group: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _text(path: Path) -> Iterator[tuple[str, bool]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from _cut(iter(lambda: file.read(PIECE), ""))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, bool]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                where = f"{path}, line {number}"
                raise DataError(f"{where}: a JSON object with a string `text` is needed")
            yield from _cut([text])


def _cut(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """One document in pieces, cut where the usual tokenizers would cut as well: after a line."""
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > 2 * PIECE:
            at = _line_end(rest, PIECE)
            yield rest[:at], False
            rest = rest[at:]
    if rest:
        yield rest, True


def _line_end(text: str, least: int) -> int:
    """Index after the first lone newline at or after `least`, or where the last piece fits."""
    at = text.find("\n", least)
    while 0 < at < len(text) - 1:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.find("\n", at + 1)
    return 2 * least


def _digest(source: _Kept, tokenizer: Any) -> str:
    """SHA-256 of what the tokens depend on."""
    digest = hashlib.sha256(f"{_FORMAT} {PIECE} {tokenizer_digest(tokenizer)}".encode())
    if not isinstance(source, str | os.PathLike):
        for index, text in enumerate(source):
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                kind = type(text).__name__
                raise DataError(f"text {index} is a {kind}: a corpus is a list of str")
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(raw)} ".encode() + raw)
        return digest.hexdigest()
    for path in files(source):
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells tokenizers apart: all they know, as JSON, and how documents end."""
    known = f"{tokenizer.backend.to_str()} {_end_id(tokenizer)}"
    return hashlib.sha256(known.encode("utf-8", "replace")).hexdigest()


def _text_bytes(ids: np.ndarray, tokenizer: Any) -> int:
    """Bytes of UTF-8 that ids stand for, special tokens not counted."""
    size = 0
    for start in range(0, len(ids), 1 << 16):
        part = ids[start : start + (1 << 16)].tolist()
        size += len(tokenizer.decode(part, skip_special_tokens=True).encode("utf-8", "replace"))
    return size
