"""Workers from the side of who asks them."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
# How long a thread without work spins is for each library to say: a wait policy given from
# outside would slow some and not others.
_UNSET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND", "TOKENIZERS_PARALLELISM")
_TICKS = os.sysconf("SC_CLK_TCK")


class AbsentError(Exception):
    """A library that cannot be imported."""


class FailedError(Exception):
    """A worker that could not do what it was asked."""


class Worker:
    """A warm process that does a job when it is asked to, and sleeps otherwise.

    Errors: AbsentError where its library is not there, FailedError where it fails.
    """

    def __init__(self, name: str, python: str, threads: int, log: Path) -> None:
        self.name = name
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker", name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=environment(threads), cwd=ROOT, text=True,
            )  # fmt: skip
        self.versions: dict[str, str] = self._read()["versions"]

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """One request, and what it answers."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise FailedError(f"{self.name} ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise FailedError(f"{self.name} ended (exit code {self.process.wait()})")
        found = json.loads(line)
        if "absent" in found:
            raise AbsentError(f"{self.name}: {found['absent']}")
        if "error" in found:
            raise FailedError(f"{self.name}: {found['error']}")
        return found

    def cpu_seconds(self) -> float:
        """What the process has computed so far, all threads together (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def peak_mib(self) -> float:
        """The most memory that it held (Linux)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(threads: int, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a worker sees: so many threads, nothing fetched, and each library's own waiting."""
    kept = {name: value for name, value in given.items() if name not in _UNSET}
    counts = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads)
    )
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return kept | counts | offline
