"""One row measured: ours beside each other contender, in warm processes, in the order A B B A."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    """A row's record: figures, ratios, gates and ceilings, with every slice's seconds."""
    began = time.time()
    others = [each for each in row.others if each.peer in (*settings.peers, "polyhead")]
    seen = {each.name: Seen(each.peer) for each in (row.ours, *others)}
    itself, idle = None, 0.0
    with settings.worker("machine") as machine:
        machine.ask("open", job="ceilings", options={})
        ceilings = [machine.ask("answer")["answer"]]
        with _opened(row, row.ours, settings, seen[row.ours.name]) as ours:
            if row.is_timed:
                twin = Contender(row.ours.name, row.ours.peer, row.ours.options)
                pair = _Pair(settings, ours, say)
                with _opened(row, twin, settings, Seen("polyhead")) as second:
                    times = pair.run(second, f"{row.name}: against itself")
                itself = asdict(ratio(times.second, times.ours))
                for each in others:
                    times = _beside(row, each, pair, settings, seen[each.name])
                    if times:
                        seen[each.name].ratio = asdict(ratio(times.second, times.ours))
                        ceilings.append(machine.ask("answer")["answer"])
                idle = pair.idle_share
                seen[row.ours.name].seconds = pair.all_ours
                seen[row.ours.name].notes = pair.notes
                if row.goals:
                    seen[row.ours.name].call_mib = ours.ask("memory")["mib"]
            seen[row.ours.name].peak_mib = ours.peak_mib()
    if not row.is_timed:
        for each in others:
            say(f"{row.name}: {each.name}")
            with _taking_part(seen[each.name]), _opened(row, each, settings, seen[each.name]):
                pass
    _judge(row, settings, seen)
    middle = {key: statistics.median(one[key] for one in ceilings) for key in ceilings[0]}
    return {
        "row": row.name, "about": row.about, "unit": row.unit, "goals": dict(row.goals),
        "pairs": settings.pairs if row.is_timed else 0, "threads": settings.threads,
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        "took": time.time() - began, "ceilings": middle, "itself": itself, "idle_share": idle,
        "ours": row.ours.name,
        "contenders": {name: _record(row, one, middle) for name, one in seen.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Seconds a call, pair by pair."""

    ours: list[float]
    second: list[float]


class _Pair:
    """Ours, already open, beside one after the other. Whoever is not asked should sleep."""

    def __init__(self, settings: Settings, ours: Worker, say: Callable[[str], object]) -> None:
        self.settings, self.ours, self.say = settings, ours, say
        self.all_ours: list[float] = []
        self.notes: dict[str, float] = {}
        self.idle_share = 0.0

    def run(self, second: Worker, name: str) -> Times:
        """Slices in turn after two calls of each that warm it."""
        for worker in (self.ours, second):
            for _ in range(2):
                worker.ask("slice", seconds=0)
        takes = {
            "ours": partial(self._take, self.ours, second),
            "second": partial(self._take, second, self.ours),
        }
        found = in_turn(
            takes, self.settings.pairs,
            lambda turn: self.say(f"{name}, pair {turn + 1} of {self.settings.pairs}"),
        )  # fmt: skip
        self.notes = found["ours"][-1]["notes"]
        self.second_notes = found["second"][-1]["notes"]
        times = Times(*([one["seconds"] for one in found[name]] for name in ("ours", "second")))
        self.all_ours += times.ours
        return times

    def _take(self, worker: Worker, other: Worker) -> dict[str, Any]:
        began, before = time.perf_counter(), other.cpu_seconds()
        found = worker.ask("slice", seconds=self.settings.seconds)
        share = (other.cpu_seconds() - before) / (time.perf_counter() - began)
        self.idle_share = max(self.idle_share, share)
        return found


def _beside(row: Row, each: Contender, pair: _Pair, settings: Settings, seen: Seen) -> Times | None:
    """Ours and another contender; None where it cannot take part."""
    with _taking_part(seen), _opened(row, each, settings, seen) as worker:
        times = pair.run(worker, f"{row.name}: {each.name}")
        seen.seconds, seen.notes = times.second, pair.second_notes
        if row.goals:
            seen.call_mib = worker.ask("memory")["mib"]
        seen.peak_mib = worker.peak_mib()
        return times
    return None


@contextmanager
def _taking_part(seen: Seen) -> Iterator[None]:
    """Who cannot take part is noted, and the others go on."""
    try:
        yield
    except AbsentError:
        seen.missing = "absent"
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

        given = {
            key: value
            for key, value in row.options(row.ours, settings.inputs).items()
            if key != "form"
        }
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
