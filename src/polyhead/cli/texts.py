"""What the verbs over texts share: reading lines, progress with time left, tables and JSON."""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size

from polyhead.cli.common import note, read_text
from polyhead.errors import DataError

_WORTH_A_BAR_S = 1.0
_WIDTH = 160  # where standard output is no terminal
_LONGEST = 60  # of a column that is not the last
_GAP = "  "


def lines_of(texts: Sequence[str], file: str | None, what: str = "text") -> list[str]:
    """The texts of a command line; "-" among them is the lines of standard input.

    file: one whose lines are texts as well. Errors: DataError where there is none, and for empty
    lines.
    """
    found: list[str] = []
    for text in texts:
        found += _lines("-") if text == "-" else [text]
    if file is not None:
        found += _lines(file)
    if not found:
        raise DataError(f"there is no {what}; give one in quotes, --file FILE, or - for stdin")
    for text in found:
        if not text.strip():
            raise DataError(f"a {what} is empty; leave it out, or give it words")
    return found


def pairs_of(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """First and second texts of lines with a tab between them."""
    halves = [line.split("\t") for line in lines]
    for line, parts in zip(lines, halves, strict=True):
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise DataError(f"{line[:60]!r} is no pair; write two texts with a tab between them")
    return [first for first, _ in halves], [second for _, second in halves]


def _lines(name: str) -> list[str]:
    """A file's lines; "-" is standard input."""
    source = "standard input" if name == "-" else name
    lines = read_text(name).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    lines = [line.removesuffix("\r") for line in lines]
    if not lines:
        raise DataError(f"{source} is empty; give it a line for each text")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"line {number} of {source} is empty; take it out")
    return lines


@contextmanager
def progress(text: str) -> Generator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal's standard error, once a second has passed."""
    if not sys.stderr.isatty():
        yield lambda done, every: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(text),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(text, total=None)
    timer = threading.Timer(_WORTH_A_BAR_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, every: bar.update(task, completed=done, total=every)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def note_cut(cut: int, every: int, most: int | None) -> None:
    """A line on standard error where texts were longer than the model. most: tokens it takes."""
    if cut:
        note(f"of {cut} of {every} texts the end was not read: the model takes {most} tokens")


def print_json(records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their columns' names; numbers stand on the right, long texts are cut."""
    shown = [[_shown(value) for value in row] for row in rows]
    last = len(columns) - 1
    left = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
    widths: list[int] = []
    for number, name in enumerate(columns):
        widest = max([cell_len(name), *(cell_len(row[number]) for row in shown)])
        # The last column takes what the others leave.
        widths.append(min(widest, _LONGEST) if number < last else max(min(widest, left), 8))
        left -= widths[-1] + len(_GAP)
    numeric = [all(_is_number(row[number]) for row in shown) for number in range(len(columns))]
    for row in [list(columns), *shown]:
        cells = [
            _cell(text, width, is_number)
            for text, width, is_number in zip(row, widths, numeric, strict=True)
        ]
        print(_GAP.join(cells).rstrip())


def _cell(text: str, width: int, is_number: bool) -> str:
    """A text as wide as its column."""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, width - 1) + "…"
    return " " * (width - size) + text if is_number else text + " " * (width - size)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split())


def _is_number(text: str) -> bool:
    return text.removeprefix("-").replace(".", "", 1).isdigit()
