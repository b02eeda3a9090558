"""A sign of life for work that takes a while."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

_WORTH_A_WORD_S = 1.0


@contextmanager
def spinner(text: str, quiet: bool = False) -> Generator[None]:
    """A line with a spinner on standard error, once the work has taken a second."""
    if quiet:
        yield
        return
    from rich.console import Console  # only here: short work needs no terminal

    status = Console(stderr=True).status(text)
    timer = threading.Timer(_WORTH_A_WORD_S, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()
