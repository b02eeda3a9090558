"""What a run tells: `log.jsonl` in its directory, and a view on standard error."""

import contextlib
import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

# Here, as it draws from `random` when it is imported: a resumed run would lose its place there.
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file

TIMES = ("seconds", "tokens_per_second", "rows_per_second", "memory_bytes")
"""Fields of a log line that a resumed run need not repeat."""


class Log:
    """JSON lines, one an event, each with its `step`; appended and flushed as they come."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        if path.exists():
            _truncate(path, step)
        self._file = _opened(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. FileError, at once, where the disk takes no more or has gone."""
        with self._told():
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            # A file that was removed takes lines as before; nobody will read them.
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                raise FileNotFoundError(errno.ENOENT, "another file is in its place")

    def sync(self) -> None:
        """Flush to disk, so that no checkpoint is ahead of its log."""
        with self._told():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            what = "put its disk back" if error.errno == errno.ENOENT else "make room"
            raise FileError(
                f"{self._file.name} cannot be written ({error.strerror}): {what}, and resume"
            ) from None

    def close(self) -> None:
        """Close the file; what it did not take was told when it was written."""
        with contextlib.suppress(OSError):
            self._file.close()


def _opened(path: Path) -> TextIO:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"{path} cannot be written ({error.strerror}): check its permissions"
        ) from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def standing(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that a run still stands by: those of steps that it went back from are left out."""
    kept: list[Mapping[str, Any]] = []
    for record in records:
        if "rewound_to" in record:
            kept = [before for before in kept if before["step"] <= record["rewound_to"]]
        else:
            kept.append(record)
    return kept


def _truncate(path: Path, step: int) -> None:
    """Drop what was written after the checkpoint of `step`: a resumed run will write it again."""
    records, kept = read_log(path), 0
    for place, record in enumerate(records, 1):
        # A run goes back to its newest checkpoint: if to an earlier one than this, before this.
        back = record.get("rewound_to")
        if record["step"] <= step if back is None else back < step:
            kept = place
    with atomic_file(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records[:kept]).encode())


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, on the GPU where it trains on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def tell_tokenising(every: float = 2.0) -> Callable[[int, int], None]:
    """A progress for `load_tokens`: a line on standard error every so many seconds."""
    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= every:
            said = time.monotonic()
            print(f"tokenising: {done / max(1, total):.0%}", file=sys.stderr)

    return tell


def clock(seconds: float) -> str:
    """Seconds as 1:23:45, or as 23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class View:
    """Progress on standard error: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, step: int, *, quiet: bool = False) -> None:
        self.steps, self.first, self.began = steps, step, time.monotonic()
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("training", total=steps, completed=step, figures="")
        self.valid = ""

    def __enter__(self) -> "View":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: int, loss: float, bits_per_byte: float | None, speed: float) -> None:
        """Move the bar; cheap enough for every step. Speed is in tokens, or rows without bytes."""
        if self.live:
            figures = self._figures(step, loss, bits_per_byte, speed)
            self.bar.update(self.task, completed=step, figures=figures)

    def show(self, record: dict[str, Any]) -> None:
        """Say what the log says."""
        step = record["step"]
        if "sample" in record:
            self.say(f"step {step}  sample: {record['sample']}")
        elif "skipped" in record:
            self.say(f"step {step}  left out: {record['skipped']}")
        elif "rewound_to" in record:
            self.say(
                f"step {step}  the loss leapt to {record['spike']:.4g}: back to step "
                f"{record['rewound_to']}, and past the data since"
            )
        elif "spike" in record:
            self.say(
                f"step {step}  the loss leapt to {record['spike']:.4g}, and there is no checkpoint "
                "yet to go back to"
            )
        elif "valid_loss" in record:
            names = [name for name in record if name.startswith("valid_")]
            shown = [f"{_spoken(name)} {record[name]:.4f}" for name in names]
            if "valid_bits_per_byte" in record:
                shown[1] = f"{record['valid_bits_per_byte']:.4f} bits per byte"
            best = record[names[min(1, len(names) - 1)]]
            self.valid = f"  held out {best:.3f}"
            self.say(f"step {step}  held-out {'  '.join(shown)}")
        elif "loss" in record and not self.live:
            speed = record.get("tokens_per_second", record.get("rows_per_second", 0.0))
            bits = record.get("bits_per_byte")
            figures = self._figures(step, record["loss"], bits, speed)
            zeros = f"  {record['sparsity']:.1%} zeros" if "sparsity" in record else ""
            self.say(f"step {step}/{self.steps}  {figures}{zeros}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def _figures(self, step: int, loss: float, bits_per_byte: float | None, speed: float) -> str:
        done = max(1, step - self.first)
        left = (time.monotonic() - self.began) / done * (self.steps - step)
        bits = "" if bits_per_byte is None else f"  {bits_per_byte:.3f} bits per byte"
        unit = "rows" if bits_per_byte is None else "tokens"
        return (
            f"loss {loss:.4f}{bits}{self.valid if self.live else ''}  "
            f"{speed:,.0f} {unit}/s  {clock(left)} left"
        )


def _spoken(name: str) -> str:
    return name.removeprefix("valid_").replace("_", " ")
