"""What verbs share: reading text, and words on standard error."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from polyhead.errors import DataError, FileError
from polyhead.files.spinner import spinner


def read_text(name: str) -> str:
    """The text of a UTF-8 file; "-" is standard input."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {name}: {error.strerror}") from None
    return decoded(raw, name)


def decoded(raw: bytes, name: str) -> str:
    """UTF-8 as text, without a byte order mark; `name` is where it came from."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        source = "standard input" if name == "-" else name
        raise DataError(f"{source} is not UTF-8 ({error.reason}); convert it first") from None


def given_fields(argv: Sequence[str], names: Sequence[str]) -> set[str]:
    """Which of a config's fields the command line names."""
    flags = {word.partition("=")[0].replace("_", "-") for word in argv}
    return {
        name
        for name in names
        if flags & {f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"}
    }


def note(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def working(text: str) -> AbstractContextManager[None]:
    """A spinner on a terminal's standard error, once the work has taken a second."""
    return spinner(text, quiet=not sys.stderr.isatty())
