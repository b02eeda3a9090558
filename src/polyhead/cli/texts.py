"""What the verbs over texts share: reading lines, progress with time left, tables and JSON."""

import json
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from polyhead.cli.opening import read_text
from polyhead.errors import DataError

_WORTH_A_BAR_S = 1.0
_WIDTH = 160


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


def print_json(records: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Rows under their columns' names; numbers stand on the right, long texts are cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [[_shown(value) for value in row] for row in rows]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(columns):
        is_number = all(_is_number(row[number]) for row in rows)
        table.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=True,
            overflow="ellipsis" if number == len(columns) - 1 else "fold",
        )
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    # Captured: rich would make an exit of its own of a reader that has gone.
    with console.capture() as page:
        console.print(table)
    print("\n".join(line.rstrip() for line in page.get().rstrip("\n").split("\n")))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return " ".join(str(value).split())


def _is_number(text: str) -> bool:
    return text.removeprefix("-").replace(".", "", 1).isdigit()
