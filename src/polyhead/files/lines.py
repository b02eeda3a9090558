"""Files of lines: text and its numbers, the fields of TSV and CSV, the objects of JSONL."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from polyhead.errors import DataError

MOST_FIELD = 1 << 24  # characters of one field
_SHOWN = 8


def kind_of(path: Path) -> str:
    """The ending that says what a file holds: .gz says nothing of that."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def unzipped(file: BinaryIO, path: Path) -> BinaryIO:
    """What a file holds, of one that ends in .gz what is packed in it."""
    if path.suffix != ".gz":
        return file
    # GzipFile's own lines are slow.
    return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 16)  # pyright: ignore


def lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    """Lines as text, without a byte order mark; DataError with the line that is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 ({error.reason}); convert it first"
            ) from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def objects(file: Iterable[bytes], path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and what each line of JSON holds; blank lines are passed over."""
    for number, line in enumerate(lines(file, path), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            raise DataError(
                f"{path}, line {number}: not JSON ({reason}); mend or remove it"
            ) from None


def cells(file: Iterable[bytes], path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields of TSV, where a quotation mark is a character like any other, or of
    CSV as RFC 4180 has it; blank lines are passed over."""
    texts = lines(file, path)
    if kind == ".tsv":
        for number, text in enumerate(texts, 1):
            if fields := text.rstrip("\r\n"):
                yield number, fields.split("\t")
        return
    csv.field_size_limit(MOST_FIELD)
    reader = csv.reader(texts, strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; mend or remove it") from None


def columns_of(
    first: Sequence[str], wanted: Sequence[str], names: Sequence[str], path: Path
) -> tuple[list[str], bool]:
    """What the columns of a delimited file are called, and whether its first line says so.

    Without `names` the first line is a header, unless all columns asked for are numbers that none
    of them is called.
    """
    numbers = [name for name in wanted if name.isdecimal()]
    by_number = bool(wanted) and len(numbers) == len(wanted) and not set(wanted) <= set(first)
    # Names that are the first line are its header, said again.
    header = list(first) == list(names) or (not names and not by_number)
    keys = list(names) or (list(first) if header else [str(i) for i in range(len(first))])
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise DataError(f"{path} has column {twice[0]!r} twice: give each a name of its own")
    if names and len(names) != len(first):
        raise DataError(
            f"{path} has {len(first)} columns, and {len(names)} are named ({listed(names)}): name "
            "them all, from left to right"
        )
    return keys, header


def check_width(row: Sequence[str], width: int, path: Path, line: int) -> None:
    """DataError for a line that has more or fewer fields than it should."""
    if len(row) != width:
        raise DataError(
            f"{path}, line {line}: {len(row)} columns where there should be {width}; mend or "
            "remove it"
        )


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return f"{shown} …" if len(names) > _SHOWN else shown
