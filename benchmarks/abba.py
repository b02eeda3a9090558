"""Fair timing: contenders in turn, forwards and backwards, and the ratio of their times.

Each pair of slices lies side by side in time, so a slow minute touches both. The ratio's interval
is a bootstrap over the pairs; the same contender against itself says how much is noise.
"""

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """How many times faster, with a 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def slices(
    calls: Mapping[str, Call], rounds: int, seconds: float, quiet: bool = False
) -> dict[str, list[float]]:
    """Seconds a call of each contender, one slice a round, in the order A B B A."""
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr))
    for name, call in calls.items():
        say(f"warming up {name}")
        call()
        call()
    takes = {name: partial(seconds_a_call, call, seconds) for name, call in calls.items()}
    return in_turn(takes, rounds, lambda turn: say(f"round {turn + 1} of {rounds}"))


def in_turn(
    takes: Mapping[str, Callable[[], T]], rounds: int, say: Callable[[int], object]
) -> dict[str, list[T]]:
    """What each of `takes` gives, once a round, in the order A B B A; `say` is told each round."""
    found: dict[str, list[T]] = {name: [] for name in takes}
    for turn in range(rounds):
        say(turn)
        for name in list(takes) if turn % 2 == 0 else list(takes)[::-1]:
            found[name].append(takes[name]())
    return found


def seconds_a_call(call: Call, seconds: float) -> float:
    """Mean time of a call over a slice of at least so many seconds."""
    began, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        spent = time.perf_counter() - began
        if spent >= seconds:
            return spent / count


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Median of the pairs' ratios, and a bootstrap interval of it."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return Ratio(statistics.median(pairs), medians[50], medians[1949])


def with_itself(times: Sequence[float]) -> Ratio:
    """The ratio of every second slice to its neighbour: what is noise."""
    even = len(times) // 2 * 2
    return ratio(times[0:even:2], times[1:even:2])


def product_gflops(dtype: "torch.dtype", size: int = 2048) -> float:
    """What the machine's own matrix product reaches now."""
    import torch

    a, b = torch.randn(2, size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / seconds_a_call(lambda: torch.mm(a, b, out=out), 1.0) / 1e9


def memory_of(call: Call) -> float:
    """The most memory in MiB that a call holds beside what was there (Linux, glibc).

    What the call before it freed is given back first, or it would be used again unseen.
    """
    call()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
