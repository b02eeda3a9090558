"""Progress of work that may take hours."""

import sys
import time
from typing import Self


class Watch:
    """Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, text: str, every: float = 2.0) -> None:
        """text: what is done. every: seconds between lines where there is no terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, highlight=False)
        self.live, self.text, self.every = console.is_terminal, text, every
        self.bar = Progress(
            TextColumn(text), BarColumn(), TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=console, disable=not self.live, redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task(text, total=None, figures="")
        self.said = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int, figures: str) -> None:
        """What is done of all there is (0 where that is not known), and what else to say."""
        from polyhead.train.log import clock

        self.bar.update(self.task, completed=done, total=total or None, figures=figures)
        if not self.live and time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            share = f"{done / total:.0%}  " if total else ""
            seconds = self.bar.tasks[0].time_remaining
            left = "" if seconds is None else f"  {clock(seconds)} left"
            print(f"{self.text}: {share}{figures}{left}", file=sys.stderr, flush=True)
