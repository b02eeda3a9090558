"""Runs that are killed or terminated again and again, beside one that nobody disturbed."""

import random
import signal
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.reliability.runs import Left, Progress, Run, inside_a_write, left, training


class Campaign:
    """Starts a run, stops it, starts it again, until it was stopped `rounds` times; then compares.

    A run that reaches its end is compared with the undisturbed one, and another begins.
    """

    def __init__(self, folder: Path, world: int, name: str, rounds: int, **config: Any) -> None:
        self.folder, self.world, self.rounds, self.config = folder, world, rounds, config
        counted = folder / "touches"
        assert self._start(folder / "whole", count=str(counted)).wait() == 0
        self.touches = int(counted.read_text())
        self.whole: Left = left(folder / "whole")
        self.progress = Progress(name, rounds)
        self.stopped = self.runs = self.inside = 0
        self.same, self.codes, self.waits = True, set[int](), list[float]()

    @cached_property
    def length(self) -> float:
        """Seconds that a run takes once the imports are there."""
        began = time.perf_counter()
        assert self._start(self.folder / "again").wait() == 0
        return time.perf_counter() - began

    def _start(self, out: Path, **told: Any) -> Run:
        return training(out, self.world, config=self.config, **told)

    def go(self, moments: Callable[[], dict[str, Any]], number: int) -> dict[str, Any]:
        """moments: when the next death is, as `after` seconds or as what a run is told."""
        while self.stopped < self.rounds:
            self.runs += 1
            out = self.folder / f"cut-{self.runs}"
            while not self._one(out, moments, number):
                pass
            self.same = self.same and left(out) == self.whole and not inside_a_write(out)
        return {
            "ok": self.same, "signals": self.stopped, "runs_compared": self.runs,
            "inside_a_checkpoint_write": self.inside, "exit_codes": sorted(self.codes),
            "longest_seconds_to_exit": round(max(self.waits), 3),
        }  # fmt: skip

    def _one(self, out: Path, moments: Callable[[], dict[str, Any]], number: int) -> bool:
        """One process of a run; whether it reached the end."""
        told = moments() if self.stopped < self.rounds else {}
        after, ready = told.pop("after", None), Path(told.get("ready", out))
        if "ready" in told:
            ready.unlink(missing_ok=True)
        run = self._start(out, **told)
        sent = time.perf_counter()
        if after is not None:
            while "ready" in told and run.processes[0].is_alive() and not ready.exists():
                run.processes[0].join(0.005)
            run.processes[0].join(after)
            sent = time.perf_counter()
            run.send(number)
        if self.world > 1 and "die_at" in told:  # torchrun ends the others
            run.processes[0].join()
            run.send(signal.SIGKILL)
        code = run.wait()
        if code == 0:
            return True
        self.stopped += 1
        self.codes.add(code)
        self.waits.append(time.perf_counter() - sent if after is not None else 0.0)
        self.inside += inside_a_write(out)
        self.progress(self.stopped)
        return False


def killed(folder: Path, rounds: int, world: int = 1, **config: Any) -> dict[str, Any]:
    """SIGKILL at random moments."""
    campaign = Campaign(folder, world, f"kill on {world}", rounds, **config)
    draw = random.Random(0)
    return campaign.go(lambda: {"after": draw.uniform(0, 0.5 * campaign.length)}, signal.SIGKILL)


def killed_in_writes(folder: Path, rounds: int, world: int = 1, **config: Any) -> dict[str, Any]:
    """SIGKILL just before a touch of the disk: an open, a flush, a rename, a removal; drawn from
    those of a start and its first checkpoints."""
    campaign = Campaign(folder, world, f"kill in writes on {world}", rounds, **config)
    draw = random.Random(0)
    reach = min(campaign.touches // 2, 250)
    return campaign.go(lambda: {"die_at": draw.randint(1, reach)}, signal.SIGKILL)


def terminated(folder: Path, rounds: int, **config: Any) -> dict[str, Any]:
    """SIGTERM at random moments: a checkpoint within 10 s, exit code 143."""
    campaign = Campaign(folder, 1, "terminate", rounds, **config)
    draw = random.Random(0)
    # Counted from where there is a step to save.
    ready = str(folder / "ready")
    found = campaign.go(
        lambda: {"after": draw.uniform(0, 0.4) * campaign.length, "ready": ready}, signal.SIGTERM
    )
    found["ok"] = found["ok"] and max(campaign.waits) < 10 and campaign.codes <= {143}
    return found
