"""Rows with named columns: from TSV, CSV, JSONL and Parquet files, or a list of dicts.

A file is read once, its bytes hashed as they pass, and its columns are kept in memory as lists: a
few million rows of text take some gigabytes, so files above MOST_BYTES are refused.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from polyhead.errors import ConfigError, DataError
from polyhead.files.lines import cells, check_width, columns_of, listed, objects

Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

MOST_BYTES = 8 << 30
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns by the name of their role, all of one length.

    `table[3]` is a row, `table.take([3, 1])` a table. digest: of the bytes or values it was made
    from, and of the roles. name: what errors call it. numbers: where its rows stood in the whole
    table, when it is a part of one.
    """

    columns: Mapping[str, Sequence[Any]]
    digest: str
    name: str
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: values[row] for name, values in self.columns.items()}

    def take(self, rows: Iterable[int]) -> "Table":
        """The same columns of some rows."""
        rows = list(rows)
        columns = {n: [values[row] for row in rows] for n, values in self.columns.items()}
        return Table(columns, self.digest, self.name, [self.number(row) for row in rows])

    def number(self, row: int) -> int:
        """Where a row stands in the whole table, from 0."""
        return row if self.numbers is None else self.numbers[row]


@dataclass(frozen=True)
class ExampleColumns:
    """Where the parts of an example stand in a table.

    roles: the column of each role that is not named as its role ({"text": "1", "label": "0"}).
    names: the columns' names from left to right, for a TSV or CSV file without a header. Without
    them the first line is a header, unless every column asked for is a number: then columns go by
    number, from 0.
    """

    roles: Mapping[str, str]
    names: tuple[str, ...] = ()


def read_table(
    source: Rows, wanted: Mapping[str, bool], columns: ExampleColumns | None = None
) -> Table:
    """The columns that an objective reads, under the names of their roles.

    wanted: roles, and whether each must be there; one that need not be, and that `columns` does
    not name, is taken where a column has its name.
    Raises DataError for what cannot be read, ConfigError for roles that are none.
    """
    spec = columns or ExampleColumns({})
    for role in spec.roles:
        if role not in wanted:
            raise ConfigError(f"there is no role {role!r}; a row here has {', '.join(wanted)}")
    needed = {
        role: spec.roles.get(role, role)
        for role, required in wanted.items()
        if required or role in spec.roles
    }
    optional = [role for role in wanted if role not in needed]
    if not isinstance(source, str | os.PathLike):
        found, digest, name = _given(source)
    else:
        path = Path(source)
        name, found, digest = str(path), *_read_file(path, needed.values(), optional, spec.names)
    if not found:
        raise DataError(f"{name} holds no rows: give a file with some")
    may_lack_header = name.endswith((".tsv", ".csv")) and not spec.names
    if missing := [column for column in needed.values() if column not in found]:
        raise DataError(
            f"{name} has no column {listed(missing)}; it has {listed(list(found))}: name yours "
            f"for {', '.join(role for role, column in needed.items() if column in missing)}"
            + (", or all columns, if its first line is no header" if may_lack_header else "")
        )
    taken = {role: found[column] for role, column in needed.items()}
    taken |= {role: found[role] for role in optional if role in found}
    if not taken:
        raise DataError(
            f"{name} has no column {listed(list(wanted))}; it has {listed(list(found))}: name "
            "yours for those that are needed"
        )
    if not len(next(iter(taken.values()))):
        raise DataError(f"{name} holds no rows: give a file with some")
    seal = json.dumps([digest, sorted(needed.items()), sorted(taken)])
    return Table(taken, hashlib.sha256(seal.encode()).hexdigest(), name)


def _given(rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], str, str]:
    """Columns of rows that are in memory, and their digest."""
    columns: dict[str, list[Any]] = {}
    digest = hashlib.sha256()
    count = 0
    for count, row in enumerate(rows, 1):
        _append(columns, row, count, f"row {count - 1}")
        digest.update(json.dumps(row, sort_keys=True, default=_said).encode() + b"\n")
    return columns, digest.hexdigest(), f"the list of {count} rows"


def _said(value: Any) -> str:
    """What JSON has no form for; arrays by all they hold, for their repr leaves most out."""
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return repr(value)


def _append(columns: dict[str, list[Any]], row: Any, count: int, where: str) -> None:
    """Add the count-th row; its columns must be those of the first."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}: a row is an object with named columns")
    if count == 1:
        columns.update({str(name): [] for name in row})
    if row.keys() != columns.keys():
        apart = sorted(map(str, row.keys() ^ columns.keys()))
        raise DataError(f"{where} differs from the first in {listed(apart)}: every row has all")
    for name, value in row.items():
        columns[name].append(value)


def _read_file(
    path: Path, needed: Iterable[str], optional: Iterable[str], names: tuple[str, ...]
) -> tuple[dict[str, list[Any]], str]:
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise DataError(f"{str(path)[:80]} is not a table: name a file that ends in {kinds}")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"{path} has {size >> 30} GB, more than {MOST_BYTES >> 30}, and is held in "
                "memory: split it"
            )
        with open(path, "rb") as raw:
            stream = _Hashed(raw)
            file = io.BufferedReader(stream, 1 << 20)
            if path.suffix == ".parquet":
                columns = _parquet(path, {*needed, *optional})
            elif path.suffix == ".jsonl":
                columns = _jsonl(file, path)
            else:
                columns = _delimited(file, path, list(needed), names)
            return columns, stream.finish()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        self._raw, self._digest = raw, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def finish(self) -> str:
        """The digest of the whole file."""
        while data := self._raw.read(1 << 22):
            self._digest.update(data)
        return self._digest.hexdigest()


def _jsonl(file: BinaryIO, path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for count, (number, row) in enumerate(objects(file, path), 1):
        _append(columns, row, count, f"{path}, line {number}")
    return columns


def _delimited(
    file: BinaryIO, path: Path, wanted: Sequence[str], names: tuple[str, ...]
) -> dict[str, list[Any]]:
    rows = cells(file, path, path.suffix)
    line, first = next(rows, (0, []))
    if not first:
        return {}
    keys, header = columns_of(first, wanted, names, path)
    values: list[list[str]] = [[] for _ in keys]
    for number, row in rows if header else chain([(line, first)], rows):
        check_width(row, len(keys), path, number)
        for column, value in zip(values, row, strict=True):
            column.append(value)
    return dict(zip(keys, values, strict=True))


def _parquet(path: Path, wanted: set[str]) -> dict[str, list[Any]]:
    """The wanted columns; the others by their names alone."""
    try:
        import pyarrow as arrow  # pyright: ignore[reportMissingTypeStubs]
        from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigError(
            f"{path} needs pyarrow to be read: pip install 'polyhead[data]'"
        ) from None
    try:
        names: list[str] = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in names if name in wanted])
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0][:100]
        raise DataError(f"{path} is not Parquet ({reason}); write it again") from None
    return {name: table[name].to_pylist() if name in wanted else [] for name in names}
