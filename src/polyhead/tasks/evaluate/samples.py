"""Samples of evaluations from files: rows of JSON lines or tables, and texts."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import DataError, FileError

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The objects of a `.jsonl` file, or the rows of a `.tsv` or `.csv` one under their header.

    Errors: FileError for what cannot be read, DataError for a file without rows or a broken line.
    """
    text = read_text(path)
    kind = path.suffix.lower()
    if kind == ".jsonl":
        rows = [_object(line, number, path) for number, line in _lines(text)]
    elif kind in (".tsv", ".csv"):
        rows = _table(text, "\t" if kind == ".tsv" else ",", path)
    else:
        raise DataError(f"{path} is no .jsonl, .tsv or .csv file; write one JSON object a line")
    if not rows:
        raise DataError(f"{path} has no rows; give it one for each sample")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert it first") from None


def read_texts(path: Path, column: str) -> list[str]:
    """The texts of a file: its rows' `column`, or all of it where it holds no rows."""
    if path.suffix.lower() not in (".jsonl", ".tsv", ".csv"):
        return [read_text(path)]
    rows = read_rows(path)
    return [text_of(row, column, number, path) for number, row in enumerate(rows)]


def field_of(row: Row, column: str, number: int, path: Path) -> Any:
    """A row's value of a column; DataError where it has none."""
    value = row.get(column)
    if value is None:
        raise DataError(
            f"{path}: row {number + 1} has no {column!r}, only {', '.join(row) or 'nothing'}; "
            f"say which column is meant: --columns {column}=NAME"
        )
    return value


def text_of(row: Row, column: str, number: int, path: Path) -> str:
    """A row's text of a column; numbers are written out."""
    value = field_of(row, column, number, path)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{path}: row {number + 1}: {column!r} is {value!r:.60}, and no text")
    return str(value)


def _lines(text: str) -> list[tuple[int, str]]:
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _object(line: str, number: int, path: Path) -> Row:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else "it is too deep"
        raise DataError(f"{path}: line {number} is no JSON ({what}); mend it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: line {number} is {value!r:.40}; write a JSON object a line")
    return value


def _table(text: str, delimiter: str, path: Path) -> list[Row]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = csv.reader(text.splitlines(), delimiter=delimiter, quoting=quoting)
    rows = [cells for cells in lines if any(cell.strip() for cell in cells)]
    header = rows[0] if rows else []
    for number, cells in enumerate(rows[1:], 1):
        if len(cells) != len(header):
            raise DataError(
                f"{path}: row {number} has {len(cells)} cells and the header {len(header)}; mend it"
            )
    return [dict(zip(header, cells, strict=True)) for cells in rows[1:]]
