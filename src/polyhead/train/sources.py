"""Documents from wherever they are, read piece by piece and never held whole.

Files: any text, and tables with a column of texts: .jsonl, .csv, .tsv, .parquet; all but the last
may be gzipped (.gz). Folders of these. Datasets of the `datasets` library: saved to disk, by name
(`hf:NAME`), or at hand. From Python also any iterable of strings or of rows with named columns.
"""

import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from polyhead.errors import ConfigError, DataError
from polyhead.files.lines import (
    cells,
    check_width,
    columns_of,
    kind_of,
    listed,
    objects,
    unzipped,
)
from polyhead.train import hf
from polyhead.train.tokens import Piece, is_prepared

PIECE = 1 << 20  # characters tokenised at once
COLUMN = "text"
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
SUFFIXES = (".txt", *TABLES)
_BATCH = 256  # rows of a table at once
_SHOWN = 60


class Texts:
    """A source whose documents can be read as often as need be.

    column: where a row has its text. names: of a headerless .csv or .tsv file's columns, from left
    to right; without them a column that is a number counts from 0.
    Raises DataError for what is no source.
    """

    def __init__(self, source: Any, column: str = COLUMN, names: Sequence[str] = ()) -> None:
        self.column, self.names = column, tuple(names)
        if hf.is_name(source):
            source = hf.open_named(os.fspath(source))
        elif is_path(source) and hf.is_saved(source):
            source = hf.open_saved(Path(source))
        elif not is_path(source) and not isinstance(source, Sequence) and not hf.is_dataset(source):
            source = _listed_once(source)
        self.source: Any = source
        self._digests: dict[str, str] = {}

    @classmethod
    def of(cls, source: Any) -> "Texts":
        """A source as it is read by default; one that is Texts already is itself."""
        return source if isinstance(source, Texts) else cls(source)

    @property
    def path(self) -> Path | None:
        """Where the files are, if it is files."""
        return Path(self.source) if is_path(self.source) else None

    @property
    def name(self) -> str:
        """What errors call it."""
        if self.path is not None:
            return str(self.path)
        return hf.name_of(self.source) or f"{len(self.source)} texts"

    @property
    def prepared(self) -> Path | None:
        """The directory, if it holds tokens that `polyhead prepare` made."""
        return self.path if self.path is not None and is_prepared(self.path) else None

    def check(self) -> None:
        """DataError for files that are not there, and for tokens in place of texts."""
        if self.prepared is not None:
            raise DataError(f"{self.name} holds tokens, not texts: name what they were made from")
        if self.path is not None:
            files(self.path)

    def read(self) -> "Reading":
        """A pass over it."""
        return Reading(self)

    def documents(self) -> Iterator[str]:
        """The documents, whole, one after the other."""
        text: list[str] = []
        for piece, ends in self.read():
            text.append(piece)
            if ends:
                yield "".join(text)
                text.clear()

    def digest(self, about: str) -> str:
        """SHA-256 of the contents and of `about`; the contents are read once for each."""
        if about not in self._digests:
            self._digests[about] = self._digest(about)
        return self._digests[about]

    def _digest(self, about: str) -> str:
        told = "" if self.column == COLUMN and not self.names else f" {self.column} {self.names}"
        digest = hashlib.sha256((about + told).encode())
        if self.path is None:
            for text in _rows(self):
                raw = text.encode("utf-8", "surrogatepass")
                digest.update(f"{len(raw)} ".encode() + raw)
            return digest.hexdigest()
        for path in files(self.path):
            digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
            with _opened(path) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


Source = str | os.PathLike[str] | Iterable[str | Mapping[str, Any]] | Texts


class Reading:
    """The pieces of a source, of about PIECE characters at most, in one pass.

    done, total: bytes of files, characters of a list or rows of a dataset; total is 0 where nobody
    knows it.
    """

    def __init__(self, texts: Texts) -> None:
        self.texts, self.done, self.total = texts, 0, 0

    def __iter__(self) -> Iterator[Piece]:
        texts = self.texts
        texts.check()
        if texts.path is not None:
            yield from self._files(texts.path)
        elif hf.is_dataset(texts.source):
            self.total = hf.length(texts.source)
            for text in _rows(texts):
                self.done += 1
                yield from cut([text])
        else:
            self.total = sum(map(_size, texts.source))
            for row, text in zip(texts.source, _rows(texts), strict=True):
                self.done += _size(row)
                yield from cut([text])

    def _files(self, source: Path) -> Iterator[Piece]:
        paths = files(source)
        sizes = [path.stat().st_size for path in paths]
        self.total = sum(sizes)
        before = 0
        for path, size in zip(paths, sizes, strict=True):
            with _opened(path) as file:
                try:
                    for piece, share in _pieces(file, path, self.texts):
                        self.done = before + (file.tell() if share is None else int(share * size))
                        yield piece
                except (OSError, EOFError, zlib.error) as error:  # what gzip finds wrong, too
                    reason = getattr(error, "strerror", None) or error
                    raise DataError(f"cannot read {path}: {reason}") from None
            before += size
            self.done = before


def is_path(source: Any) -> bool:
    """Whether a source is a place, not the texts themselves."""
    return isinstance(source, str | os.PathLike)


def files(source: str | os.PathLike[str]) -> list[Path]:
    """The files a path stands for: itself, or every text and table below it, sorted."""
    path = Path(source)
    # os.path answers where pathlib raises: for a text that is too long to be a name.
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        name = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}…"
        raise DataError(f"no such file or folder: {name!r}; for a text itself pass a list of texts")
    found = sorted(p for p in path.rglob("*") if kind_of(p) in SUFFIXES and p.is_file())
    if not found:
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"no {kinds} file in {path}: put the corpus there")
    return found


def cut(parts: Iterable[str]) -> Iterator[Piece]:
    """One document in pieces, cut where the usual tokenizers would cut as well: after a line."""
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > 2 * PIECE:
            at = line_end(rest, PIECE)
            yield rest[:at], False
            rest = rest[at:]
    if rest:
        yield rest, True


def line_end(text: str, least: int) -> int:
    """Index after the first lone newline at or after `least`, or where the last piece fits."""
    at = text.find("\n", least)
    while 0 < at < len(text) - 1:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
        at = text.find("\n", at + 1)
    return 2 * least


def groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces together until they make PIECE characters: tokenizers are faster on many at once."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _listed_once(source: Any) -> list[Any]:
    """What can be read but once, kept."""
    if hf.is_several(source):
        raise DataError(f"a dataset of several splits is no corpus: take {listed(list(source))}")
    try:
        return list(source)
    except TypeError:
        kind = type(source).__name__
        raise DataError(f"a corpus is a path, a dataset, or a list of str, not a {kind}") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _size(row: Any) -> int:
    """Characters of a text; a row counts 1."""
    return len(row) if isinstance(row, str) else 1


def _rows(texts: Texts) -> Iterator[str]:
    """The texts of a list or a dataset."""
    source = texts.source
    rows = hf.rows(source, texts.column) if hf.is_dataset(source) else source
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield row
        elif isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            yield text_of(row, texts.column, f"row {number} of {texts.name}")
        else:
            kind = type(row).__name__
            raise DataError(f"text {number} is a {kind}: a corpus is a list of str, or of rows")


def text_of(row: Any, column: str, where: str) -> str:
    """The text of a row; DataError where it has none, saying what it has."""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise DataError(f"{where} is a {kind}: an object with a string {column!r} is needed")
    if column not in row:
        raise DataError(lacking(where, column, list(map(str, row))))
    if not isinstance(row[column], str):
        raise DataError(f"{where}: {column!r} is a {type(row[column]).__name__}, not a text")
    return row[column]


def lacking(where: str, column: str, there: Sequence[str]) -> str:
    """What is said where a column is missing."""
    has = f"it has {listed(there)}" if there else "it has none"
    return f"{where} has no column {column!r}; {has}: name the column of the texts (--text NAME)"


def _pieces(file: BinaryIO, path: Path, texts: Texts) -> Iterator[tuple[Piece, float | None]]:
    """Pieces of a file, and the share of it that is read where its position does not say."""
    kind = kind_of(path)
    if kind == ".parquet":
        for text, share in _parquet(path, texts.column):
            yield from ((piece, share) for piece in cut([text]))
        return
    raw = unzipped(file, path)
    if kind in TABLES:
        found = _table(raw, path, kind, texts)
        yield from ((piece, None) for text in found for piece in cut([text]))
        return
    try:
        reader = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        yield from ((piece, None) for piece in cut(iter(lambda: reader.read(PIECE), "")))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from None


def _table(file: Iterable[bytes], path: Path, kind: str, texts: Texts) -> Iterator[str]:
    """The texts of a table of lines."""
    if kind == ".jsonl":
        for number, row in objects(file, path):
            yield text_of(row, texts.column, f"{path}, line {number}")
        return
    rows = cells(file, path, kind)
    line, first = next(rows, (0, []))
    if not first:
        return
    keys, header = columns_of(first, [texts.column], texts.names, path)
    if texts.column not in keys:
        raise DataError(lacking(str(path), texts.column, keys))
    at = keys.index(texts.column)
    for number, row in rows if header else chain([(line, first)], rows):
        check_width(row, len(keys), path, number)
        yield row[at]


def _parquet(path: Path, column: str) -> Iterator[tuple[str, float]]:
    """The texts of a Parquet file, a batch of rows in memory at a time, and the share read."""
    try:
        import pyarrow as arrow  # pyright: ignore[reportMissingTypeStubs]
        from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigError(
            f"{path} needs pyarrow to be read: pip install 'polyhead[data]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise DataError(lacking(str(path), column, file.schema_arrow.names))
            rows, done = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(_BATCH, columns=[column]):
                for text in batch.column(0).to_pylist():
                    done += 1
                    yield text_of({column: text}, column, f"{path}, row {done - 1}"), done / rows
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0][:100]
        raise DataError(f"{path} is not Parquet ({reason}); write it again") from None
