"""The harness that runs peers beside ours: its arithmetic, its pipes and its tables, with fakes."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.abba import in_turn, ratio
from benchmarks.peers import gates, report
from benchmarks.peers.client import AbsentError, FailedError, Worker, environment
from benchmarks.peers.job import Job, varied, writing
from benchmarks.peers.measure import Settings, measure
from benchmarks.peers.rows import ROWS, Contender, Row, chosen
from benchmarks.peers.worker import MODULES, Server, serve

from benchmarks import __main__ as command

FAKE = """
import os, sys, types
from benchmarks.peers import worker
from benchmarks.peers.job import Job

def broken():
    raise ValueError("two\\nlines")

def lacking():
    import no_such_library

def loud():
    print("a library that greets")
    return Job(lambda: 1.0)

def dying():
    os._exit(3)

fake = types.ModuleType("benchmarks.peers.fake")
fake.versions = lambda: {"fake": "1"}
fake.JOBS = {
    "work": lambda times: Job(lambda: times, lambda: [times], {"bytes": 7}),
    "loud": loud, "broken": broken, "lacking": lacking, "dying": dying,
}
sys.modules[fake.__name__] = fake
worker.MODULES["fake"] = "fake"
sys.argv = ["worker", "fake"]
worker.main()
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python whose worker knows a library called fake."""
    script, program = tmp_path / "fake.py", tmp_path / "python"
    script.write_text(FAKE)
    program.write_text(f'#!/bin/sh\nshift 2\nPYTHONPATH=. exec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_turns_are_abba() -> None:
    order: list[str] = []
    found = in_turn(
        {name: lambda name=name: order.append(name) or name for name in "ab"}, 4, lambda turn: None
    )
    assert "".join(order) == "abbaabba"
    assert found == {"a": ["a"] * 4, "b": ["b"] * 4}


def test_an_interval_holds_the_median_and_shrinks_with_the_spread() -> None:
    wide = ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    narrow = ratio([2.9, 3.0, 3.0, 3.0, 3.1], [1.0] * 5)
    assert wide.median == narrow.median == 3
    assert wide.low < narrow.low <= 3 <= narrow.high < wide.high


@pytest.mark.parametrize(
    ("low", "high", "itself", "word"),
    [
        (1.2, 1.4, (0.95, 1.05), "faster"),
        (1.03, 1.4, (0.95, 1.05), "even"),
        (1.2, 1.4, (0.8, 1.1), "even"),  # 1 / 0.8 is more than 1.2
        (0.5, 0.7, (0.95, 1.05), "slower"),
        (0.5, 0.97, (0.95, 1.05), "even"),
    ],
)
def test_a_win_leaves_one_and_the_noise_behind(
    low: float, high: float, itself: tuple[float, float], word: str
) -> None:
    record = {"pairs": 9, "itself": {"median": 1.0, "low": itself[0], "high": itself[1]}}
    one = {"ratio": {"median": (low + high) / 2, "low": low, "high": high}}
    assert report.verdict(record, one) == word
    assert report.verdict(record | {"pairs": 8}, one).startswith("no verdict")


def _served(*requests: dict[str, Any], jobs: dict[str, Callable[..., Job]]) -> list[Any]:
    answers = io.StringIO()
    serve(Server(jobs), io.StringIO("".join(json.dumps(one) + "\n" for one in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_slice_is_at_least_a_call_and_notes_are_its_own() -> None:
    noted: list[float] = []

    def run() -> float:
        noted.append(len(noted) + 1.0)
        return 0.5

    job = Job(run, lambda: "done", {"bytes": 3}, {"first_token": noted})
    found = _served(
        {"do": "open", "job": "work", "options": {}},
        {"do": "slice", "seconds": 0}, {"do": "slice", "seconds": 0}, {"do": "answer"},
        jobs={"work": lambda: job},
    )  # fmt: skip
    one = {"seconds": 0.5, "calls": 1, "notes": {"first_token": 1.0}}
    assert found == [{"facts": {"bytes": 3}}, one, one, {"answer": "done"}]


def test_what_fails_is_an_answer_of_one_line() -> None:
    def lacking() -> Job:
        raise ImportError("no such library")

    found = _served(
        {"do": "open", "job": "lacking", "options": {}},
        {"do": "open", "job": "unknown", "options": {}}, {"do": "slice", "seconds": 0},
        jobs={"lacking": lacking},
    )  # fmt: skip
    assert found[0] == {"absent": "no such library"}
    assert found[1] == {"error": "KeyError: 'unknown'"}
    assert found[2] == {"error": "AssertionError: open a job first"}


def test_a_worker_answers_and_survives_what_fails(python: str, tmp_path: Path) -> None:
    with Worker("fake", python, 1, tmp_path / "log") as worker:
        assert worker.versions == {"fake": "1"}
        assert worker.ask("open", job="work", options={"times": 0.25}) == {"facts": {"bytes": 7}}
        assert worker.ask("slice", seconds=0)["seconds"] == 0.25
        with pytest.raises(FailedError, match="fake: ValueError: two lines"):
            worker.ask("open", job="broken", options={})
        with pytest.raises(AbsentError, match="no_such_library"):
            worker.ask("open", job="lacking", options={})
        assert worker.ask("open", job="loud", options={}) == {"facts": {}}
        assert worker.cpu_seconds() > 0
        assert worker.peak_mib() > 1
        with pytest.raises(FailedError, match="exit code 3"):
            worker.ask("open", job="dying", options={})


def test_a_worker_sees_its_threads_and_no_wait_policy() -> None:
    found = environment(2, {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "0", "HOME": "here"})
    assert found["OMP_NUM_THREADS"] == "2"
    assert found["HOME"] == "here"
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(found)


def test_prompts_vary_but_for_their_ends() -> None:
    prompts = [[5, 6, 7], [8, 9, 10]]
    first, second = varied(prompts, 1), varied(prompts, 2)
    assert [row[1:] for row in first] == [row[1:] for row in second] == [[6, 7], [9, 10]]
    assert {row[0] for row in first}.isdisjoint(row[0] for row in prompts)
    assert first != second


def test_writing_counts_from_the_first_tokens_on() -> None:
    seen: list[list[list[int]]] = []

    def write(prompts: list[list[int]], all_have_one: Callable[[], None]) -> list[list[int]]:
        seen.append(prompts)
        all_have_one()
        return [[1]]

    job = writing(write, [[3, 4]], {})
    assert 0 <= job.run() < 1
    assert len(job.notes["first_token"]) == 1
    assert job.answer() == [[1]]
    assert seen[0] != [[3, 4]]
    assert seen[1] == [[3, 4]]


def test_rows_name_what_there_is() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.judge in ("", *gates.GATES)
        names = [each.name for each in (row.ours, *row.others)]
        assert len(set(names)) == len(names)
        assert {each.peer for each in row.others} <= set(MODULES)
    assert [row.name for row in chosen(["decode-*"])] == ["decode-q4", "decode-q8"]
    with pytest.raises(ValueError, match="no row is called 'nope'"):
        chosen(["decode-*", "nope"])


class _FakeWorker:
    """Answers as a worker whose calls take so long; "gone" is absent."""

    def __init__(self, peer: str) -> None:
        if peer == "gone":
            raise AbsentError(peer)
        self.peer = peer
        self.versions = {peer: "1"}

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        if do == "open" and self.peer == "broken":
            raise FailedError("broken: it does")
        answers = {
            "open": {"facts": {"bytes": 2e9}},
            "slice": {"seconds": {"polyhead": 1.0}.get(self.peer, 3.0), "calls": 1, "notes": {}},
            "answer": {"answer": {"fp32_gflops": 1.0, "bf16_gflops": 2.0, "gbytes": 8.0}},
            "memory": {"mib": 5.0},
        }
        return answers[do]

    def cpu_seconds(self) -> float:
        return 0.0

    def peak_mib(self) -> float:
        return 10.0

    def __enter__(self) -> "_FakeWorker":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _FakeInputs:
    folder = Path()

    def model(self, name: str) -> str:
        return name


def _record(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    monkeypatch.setattr(Settings, "worker", lambda self, peer: _FakeWorker(peer))
    others = tuple(Contender(f"{peer} x", peer) for peer in ("slow", "gone", "broken", "unasked"))
    options: dict[str, Any] = dict(
        name="decode-q4", about="Some work", job="work", model={"": "m"}, unit="tokens/s",
        ours=Contender("Polyhead y", "polyhead"), others=others, given=lambda inputs: {},
        amount=2.0, bound="bytes",
    )  # fmt: skip
    row = Row(**{**options, **changes})
    inputs: Any = _FakeInputs()
    settings = Settings(("slow", "gone", "broken"), 9, 0.0, 1, "python", inputs)
    return report.machine() | measure(row, settings, lambda words: None)


def test_a_row_is_measured_whoever_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _record(monkeypatch)
    ours, slow, gone, broken = found["contenders"].values()
    assert found["itself"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ours["figure"] == 2.0
    assert ours["share"] == 2.0 * 2 / 8  # GB/s read of those that can be
    assert len(ours["seconds"]) == 18  # beside itself and beside one other
    assert slow["ratio"] == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert len(slow["seconds"]) == 9
    assert (gone["missing"], broken["missing"]) == ("absent", "failed: broken: it does")
    assert gone["figure"] is None


def test_tables_go_between_the_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = [
        _record(monkeypatch),
        _record(monkeypatch, name="forward-1.2M-fp32", unit="ms", goals={"ms": 2.5, "mib": 45}),
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, records)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| Some work (`decode-q4`) | Polyhead y | 2.00 tokens/s | itself 1.00 (1.00" in text
    assert "|  | slow x | 0.67 tokens/s | **3.00 (3.00 to 3.00)**, faster |" in text
    assert "|  | gone x | absent |" in text
    assert "| Some work | Polyhead y | 1000.00 | 2.5 | 5.0 | 45 |" in text
    report.write(page, records)
    assert page.read_text() == text
    for broken in ("", report.BEGIN, f"{report.END}{report.BEGIN}"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="tables go between"):
            report.write(page, records)


def test_the_last_record_of_a_row_counts(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    rows = [{"row": "load", "n": 1}, {"row": "decode-q4"}, {"row": "load", "n": 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.read(file) == [{"row": "decode-q4"}, {"row": "load", "n": 2}]
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1"):
        report.read(file)


def test_gates_tell_right_from_wrong() -> None:
    row = next(row for row in ROWS if row.name == "perplexity")
    found = gates.perplexity(row, {}, {row.ours.name: 3.0, "near": 3.01, "far": 3.2}, lambda *_: 0)
    assert [found[name].passed for name in ("near", "far")] == [True, False]
    found = gates.cosine(
        row, {"model": "m"}, {"near": [[1.0, 0.05]], "far": [[1.0, 1.0]]}, lambda *_: [[1.0, 0.0]]
    )
    assert [found[name].passed for name in ("near", "far")] == [True, False]
    assert str(found["far"]) == "FAILED: cosine 0.7071"
    judged = {"near": dict(same=3, of=9, regret=0.01), "far": dict(same=0, of=9, regret=1.0)}
    found = gates.greedy(row, {"model": "m", "prompts": []}, {}, lambda *_: judged)
    assert [found[name].passed for name in ("near", "far")] == [True, False]


@pytest.mark.parametrize("given", [["--only", "nope"], ["--peers", "nope"], ["--from", "nope"]])
def test_a_wrong_word_is_one_line(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "all", *given])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "nope" in said
    assert said.count("\n") == 1
