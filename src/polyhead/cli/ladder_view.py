"""What a ladder shows: a live table while it is climbed, a table and a page at its end."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from polyhead.cli.common import note
from polyhead.train.log import read_log
from polyhead.train.report import Chart, Point, Report, write_report

_EVERY = 10.0  # seconds between lines where no terminal is


class LadderView:
    """The rungs on standard error: a live table on a terminal, lines elsewhere."""

    def __init__(self, names: Sequence[str], found: Mapping[str, Mapping[str, Any]]) -> None:
        self.found = dict(found)
        self.states = dict.fromkeys(names, "")
        self.live = Live(self._table(), console=Console(stderr=True), auto_refresh=False)
        self.is_live = sys.stderr.isatty()
        self.name, self.steps, self.first, self.began = "", 0, 0, 0.0
        self.said = 0.0
        self.took: list[float] = []

    def __enter__(self) -> "LadderView":
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_live:
            self.live.stop()

    def start(self, name: str, what: str, steps: int = 0) -> None:
        """A rung begins; of a trained one how many steps it has."""
        self.name, self.steps, self.first = name, steps, -1
        self.began = self.said = time.monotonic()
        self.say(name, what + (f", {steps:,} steps" if steps else ""))

    def tell(self, record: Mapping[str, Any]) -> None:
        """A line of the rung's log."""
        if "loss" not in record:
            return
        step, now = record["step"], time.monotonic()
        if self.first < 0:  # a run that goes on does not begin at step 0, and the first is slow
            self.first, self.began = step, now
            return
        pace = (now - self.began) / (step - self.first)
        here = pace * (self.steps - step)
        whole = [*self.took, pace * self.steps]
        ahead = list(self.states)[list(self.states).index(self.name) + 1 :]
        left = here + sum(name not in self.found for name in ahead) * sum(whole) / len(whole)
        line = (
            f"step {step:,}/{self.steps:,}  {record['bits_per_byte']:.3f} bits per byte  "
            f"{_clock(here)} left, {_clock(left)} in all"
        )
        if self.is_live or now - self.said >= _EVERY:
            self.said = now
            self.say(self.name, line)

    def say(self, name: str, text: str) -> None:
        """What a rung is at."""
        self.states[name] = text
        if self.is_live:
            self.live.update(self._table(), refresh=True)
        else:
            note(f"{name}: {text}")

    def done(self, name: str, result: Mapping[str, Any]) -> None:
        """A rung is climbed."""
        self.found[name] = result
        if result["flops"]:
            self.took.append(result["seconds"])
        self.say(name, f"{result['bits_per_byte']:.3f} bits per byte on the held-out text")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, state in self.states.items():
            mark = "✓" if name in self.found else ""
            table.add_row(name, mark, state)
        return table


def rows_of(state: Mapping[str, Any]) -> list[list[str]]:
    """The table of results, its header first."""
    train_tokens = state["corpus"]["train_tokens"]
    head = [
        "rung",
        "bits per byte",
        "parameters",
        "weights a token",
        "tokens",
        "passes",
        "FLOPs",
        "seconds",
        "peak MiB",
    ]
    return [
        head,
        *(
            [
                name,
                f"{one['bits_per_byte']:.3f}",
                f"{one['parameters']:,}",
                f"{one['weights_per_token']:,}" if "weights_per_token" in one else "–",
                f"{one['tokens']:,}",
                f"{one['tokens'] / train_tokens:.1f}",
                f"{one['flops']:.3g}" if one["flops"] else "counts",
                f"{one['seconds']:.0f}",
                f"{one['memory_bytes'] / 2**20:.0f}" if one.get("memory_bytes") else "–",
            ]
            for name, one in _results(state).items()
        ),
    ]


def print_table(state: Mapping[str, Any]) -> None:
    """The results on standard output."""
    head, *rows = rows_of(state)
    table = Table(box=None, pad_edge=False)
    for column in head:
        is_name = column == "rung"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)


def write_page(path: Path, state: Mapping[str, Any]) -> None:
    """The report."""
    results, corpus, settings = _results(state), state["corpus"], state["settings"]
    bits = {name: one["bits_per_byte"] for name, one in results.items()}
    best = min(bits, key=lambda name: bits[name])
    runs = {name: Path(one["directory"]) for name, one in results.items() if one["flops"]}
    order = next((one["model"] for one in results.values() if not one["flops"]), None)
    counting = (
        f"The n-gram ({order}, interpolated modified Kneser-Ney) spends none: it counts; its order "
        "was chosen on a part of the text to learn from."
    )
    report = Report(
        title="The ladder",
        summary=(
            f"Language models in the order of their invention on {settings['data']}, each trained "
            f"for {corpus['flops']:.3g} FLOPs, judged by the same {corpus['held_out_bytes']:,} "
            "bytes that none has seen."
        ),
        facts={
            "text": settings["data"],
            "learned from": f"{corpus['train_bytes']:,} bytes",
            "held out": f"{corpus['held_out_bytes']:,} bytes",
            "tokens": f"{settings['tokenizer']}, {corpus['vocab_size']:,}",
            "context": f"{settings['context']} tokens",
            "seed": str(settings["seed"]),
            "best": f"{best}, {bits[best]:.3f}",
        },
        table=rows_of(state),
        bars=list(bits.items()),
        marked=list(bits).index(best),
        bars_caption=(
            "Bits per byte on the held-out text; lower is better. FLOPs are those of forward and "
            "backward, attention's too; of experts those that a token visits. "
            + (counting if order else "")
        ),
        charts=[
            Chart(
                "Held out, as the budget is spent",
                {name: _curve(run, "valid_bits_per_byte") for name, run in runs.items()},
                "Bits per byte on windows of the held-out text; lower is better.",
                "% of the budget",
            ),
            Chart(
                "While learning",
                {name: _curve(run, "bits_per_byte") for name, run in runs.items()},
                "Bits per byte of the text that is learned from; lower is better.",
                "% of the budget",
            ),
        ],
        samples=[(f"{name}, {bits[name]:.3f}", one["sample"]) for name, one in results.items()],
    )
    write_report(path, report)


def _results(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By rung, in the order that was asked for."""
    return {name: state["rungs"][name] for name in state["settings"]["rungs"]}


def _curve(run: Path, key: str) -> list[Point]:
    """A figure of a run's log over the share of its steps."""
    points = [(r["step"], r[key]) for r in read_log(run / "log.jsonl") if key in r]
    last = max((step for step, _ in points), default=1)
    return [(100 * step / last, value) for step, value in points]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
