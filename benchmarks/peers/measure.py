"""One row measured: ours beside each other contender, in warm processes, in the order A B B A."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.abba import in_turn, ratio
from benchmarks.peers.client import AbsentError, FailedError, Worker
from benchmarks.peers.gates import GATES
from benchmarks.peers.inputs import Inputs
from benchmarks.peers.rows import PARAMETERS, Contender, Row

_OURS = ("polyhead", "machine")


@dataclass(frozen=True)
class Settings:
    """How a row is measured. peers: those that take part. python: of the peers' environment."""

    peers: tuple[str, ...]
    pairs: int
    seconds: float
    threads: int
    python: str
    inputs: Inputs

    def worker(self, peer: str) -> Worker:
        """A process for a library."""
        python = sys.executable if peer in _OURS else self.python
        return Worker(peer, python, self.threads, self.inputs.folder / "workers.log")


@dataclass
class Seen:
    """What is known of a contender when its row is done; empty where it took no part."""

    peer: str
    seconds: list[float] = field(default_factory=list)
    answer: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peak_mib: float = 0.0
    call_mib: float | None = None
    ratio: dict[str, float] | None = None
    missing: str = ""
    gate: str = ""
    passed: bool = True


def measure(row: Row, settings: Settings, say: Callable[[str], object]) -> dict[str, Any]:
    """A row's record: figures, ratios, gates and ceilings, with every slice's seconds.

    Errors: FailedError where ours fails; what fails of another is noted.
    """
    began = time.time()
    others = [each for each in row.others if each.peer in (*settings.peers, "polyhead")]
    seen = {each.name: Seen(each.peer) for each in (row.ours, *others)}
    pairs = _Pairs(row, settings, say)
    with _opened(row, row.ours, settings, seen[row.ours.name]) as ours:
        if row.is_timed:
            pairs.measure(ours, others, seen)
    if not row.is_timed:
        for each in others:
            say(f"{row.name}: {each.name}")
            with _taking_part(seen[each.name], say), _opened(row, each, settings, seen[each.name]):
                pass
    _judge(row, settings, seen)
    ceilings = pairs.ceilings
    return {
        "row": row.name, "about": row.about, "unit": row.unit, "goals": dict(row.goals),
        "pairs": settings.pairs if row.is_timed else 0, "threads": settings.threads,
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        "took": time.time() - began, "ceilings": ceilings, "ours": row.ours.name,
        "itself": pairs.itself, "idle_share": pairs.idle_share,
        "contenders": {name: _record(row, one, ceilings) for name, one in seen.items()},
    }  # fmt: skip


class _Pairs:
    """Ours beside one contender after the other, two processes at a time.

    idle_share: of a core, the most that a process took while the other had its turn.
    """

    def __init__(self, row: Row, settings: Settings, say: Callable[[str], object]) -> None:
        self.row, self.settings, self.say = row, settings, say
        self.itself: dict[str, float] | None = None
        self.idle_share = 0.0
        self._reached: list[dict[str, float]] = []

    @property
    def ceilings(self) -> dict[str, float]:
        """What the machine reached, the median over the contenders' minutes."""
        return {
            key: statistics.median(one[key] for one in self._reached)
            for key in (self._reached[0] if self._reached else ())
        }

    def measure(self, ours: Worker, others: Sequence[Contender], seen: dict[str, Seen]) -> None:
        """Times, ratios and notes of all that take part, into `seen`."""
        mine, twin = seen[self.row.ours.name], Seen("polyhead")
        with self.settings.worker("machine") as machine:
            machine.ask("open", job="ceilings", options={})
            with _opened(self.row, self.row.ours, self.settings, twin) as second:
                self._run(ours, second, mine, twin, "against itself")
            self.itself = twin.ratio
            for each in others:
                self._reached.append(machine.ask("answer")["answer"])
                theirs = seen[each.name]
                with (
                    _taking_part(theirs, self.say),
                    _opened(self.row, each, self.settings, theirs) as second,
                ):
                    self._run(ours, second, mine, theirs, each.name)
            self._reached.append(machine.ask("answer")["answer"])
        if self.row.goals:
            mine.call_mib = ours.ask("memory")["mib"]

    def _run(self, ours: Worker, second: Worker, mine: Seen, theirs: Seen, name: str) -> None:
        """Slices in turn, after calls that warm both."""
        for worker in (ours, second):
            first = worker.ask("slice", seconds=0)
            if first["seconds"] < max(self.settings.seconds, 1):
                worker.ask("slice", seconds=0)
        takes = {"mine": partial(self._take, ours, second), "it": partial(self._take, second, ours)}
        of = f"of {self.settings.pairs}"
        found = in_turn(
            takes, self.settings.pairs,
            lambda turn: self.say(f"{self.row.name}: {name}, pair {turn + 1} {of}"),
        )  # fmt: skip
        fast, slow = ([one["seconds"] for one in found[key]] for key in takes)
        mine.seconds += fast
        theirs.seconds, theirs.ratio = slow, asdict(ratio(slow, fast))
        mine.notes, theirs.notes = _notes(found["mine"]), _notes(found["it"])
        if self.row.goals:
            theirs.call_mib = second.ask("memory")["mib"]

    def _take(self, worker: Worker, other: Worker) -> dict[str, Any]:
        began, before = time.perf_counter(), other.cpu_seconds()
        found = worker.ask("slice", seconds=self.settings.seconds)
        share = (other.cpu_seconds() - before) / (time.perf_counter() - began)
        self.idle_share = max(self.idle_share, share)
        return found


def _notes(slices: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What slices note, the median of each."""
    return {
        key: statistics.median(one["notes"][key] for one in slices) for key in slices[0]["notes"]
    }


@contextmanager
def _taking_part(seen: Seen, say: Callable[[str], object]) -> Iterator[None]:
    """Who cannot take part is noted, why is said, and the others go on."""
    try:
        yield
    except AbsentError as error:
        seen.missing = "absent"
        say(f"absent: {error}")
    except FailedError as error:
        seen.missing = f"failed: {error}"


@contextmanager
def _opened(row: Row, each: Contender, settings: Settings, seen: Seen) -> Iterator[Worker]:
    """A worker with a contender's job open; what it answers is kept for the gates."""
    with settings.worker(each.peer) as worker:
        seen.versions = worker.versions
        options = row.options(each, settings.inputs)
        seen.facts = worker.ask("open", job=row.job, options=options)["facts"]
        if row.judge:
            seen.answer = worker.ask("answer")["answer"]
        yield worker
        seen.peak_mib = worker.peak_mib()


def _judge(row: Row, settings: Settings, seen: dict[str, Seen]) -> None:
    """The gates, by a process of ours that is done before anything else is timed."""
    answers = {name: one.answer for name, one in seen.items() if one.answer is not None}
    if not row.judge or not answers:
        return
    with settings.worker("polyhead") as judge:

        def ask(job: str, options: dict[str, Any]) -> Any:
            judge.ask("open", job=job, options=options)
            return judge.ask("answer")["answer"]

        # The floats, of which what is in few bits was made.
        floats = replace(row.ours, options={})
        given = row.options(floats, settings.inputs)
        for name, gate in GATES[row.judge](row, given, answers, ask).items():
            seen[name].gate, seen[name].passed = str(gate), gate.passed


def _record(row: Row, one: Seen, ceilings: dict[str, float]) -> dict[str, Any]:
    """What is kept of a contender: all but its answer, with its figure and share of the ceiling."""
    found = {key: value for key, value in asdict(one).items() if key != "answer"}
    found["figure"] = found["share"] = None
    if one.seconds:
        middle = statistics.median(one.seconds)
        scale = 1000 if row.unit == "ms" else 1
        found["figure"] = middle * scale if row.less_is_better else row.amount / middle
        if row.bound == "bytes" and "bytes" in one.facts:
            found["share"] = found["figure"] * one.facts["bytes"] / 1e9 / ceilings["gbytes"]
        elif row.bound == "flops":
            done = found["figure"] * 2 * PARAMETERS / 1e9
            found["share"] = done / ceilings["bf16_gflops"]
    elif row.unit == "perplexity" and one.answer is not None:
        found["figure"] = math.exp(one.answer)
    return found
