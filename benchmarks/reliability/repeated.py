"""The same seed again and again: the same bytes, stopped in between or not."""

import random
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.reliability.child import TRAINERS
from benchmarks.reliability.runs import Progress, left, training

STEPS = 60


def repeated(
    folder: Path, rounds: int, objectives: Collection[str] = tuple(TRAINERS)
) -> dict[str, Any]:
    """Each objective so often; every second run is terminated once, somewhere, and goes on."""
    progress, draw = Progress("repeat", rounds * len(objectives)), random.Random(0)
    faults, done, resumed = list[str](), 0, 0
    for objective in objectives:
        first, length = None, 0.0
        for number in range(rounds):
            out = folder / objective / str(number)
            told: dict[str, Any] = {"objective": objective, "config": {"steps": STEPS}}
            began = time.perf_counter()
            run = training(out, **told)
            if number % 2:
                run.processes[0].join(draw.uniform(0.2, 0.9) * length)
                run.send(signal.SIGTERM)
                if run.wait():
                    resumed += 1
                    run = training(out, **told)
            if run.wait():
                faults.append(f"{objective} {number}: ended with {run.wait()}")
                continue
            length = length or time.perf_counter() - began
            first = first or left(out)
            if left(out) != first:
                faults.append(f"{objective} {number}: other bytes")
            done += 1
            progress(done)
    return {
        "ok": not faults, "runs": done, "objectives": list(objectives), "resumed": resumed,
        "faults": faults,
    }  # fmt: skip
