"""Runs in processes of their own, which can be killed, and what they leave, bit for bit."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability import child

from polyhead.train import checkpoint
from polyhead.train.log import TIMES, read_log

# A server that has imported everything forks the processes: a death costs no new import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.reliability.child"])

Left = tuple[dict[str, Any], list[dict[str, Any]]]


class Run:
    """`work(*given)` in processes of its own, which find each other as those of `torchrun` do."""

    def __init__(self, work: Callable[..., None], given: Sequence[Any], world: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        places = [
            {**place, "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(world)
        ]
        self.processes = [
            PROCESSES.Process(target=child.at, args=(place, work, *given)) for place in places
        ]
        for process in self.processes:
            process.start()

    def send(self, number: int) -> None:
        """A signal to every process."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self) -> int:
        """The first one's exit code, once all are gone: below 0 for a signal."""
        for process in self.processes:
            process.join()
        code = self.processes[0].exitcode
        assert code is not None
        return code


def training(out: Path, world: int = 1, **told: Any) -> Run:
    """A run from its beginning or its newest checkpoint; told: see `child.train`."""
    settings = {**told.pop("config", {}), "out": str(out)}
    return Run(child.train, [{**told, "config": settings}], world)


def command(words: Sequence[object], said: Path, world: int = 1) -> Run:
    """`polyhead WORDS`, whose standard error goes to a file."""
    return Run(child.command, [[str(word) for word in words], str(said)], world)


def left(out: Path) -> Left:
    """What a run left: every file of its newest checkpoint, and its log without times.

    Where the run stands on the disk is no part of it.
    """
    last = checkpoint.latest(out)
    assert last is not None, f"{out} holds no checkpoint"
    files: dict[str, Any] = {"step": last.name}
    for path in sorted(path for path in last.rglob("*") if path.is_file()):
        name, data = path.relative_to(last).as_posix(), path.read_bytes()
        if name == "manifest.json":  # hashes of the rest
            continue
        files[name] = data
        if name.endswith(".json"):
            files[name] = json.loads(data)
            files[name].get("config", {}).pop("out", None)
    log = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_log(out / "log.jsonl")
    ]
    return files, log


def inside_a_write(out: Path) -> bool:
    """Whether what is there was left by a process that died while it wrote a checkpoint."""
    return any((out / "checkpoints").glob(".*"))


class Progress:
    """How far a campaign is, on standard error, every few seconds."""

    def __init__(self, name: str, rounds: int, every: float = 5.0) -> None:
        self.name, self.rounds, self.every = name, rounds, every
        self.began = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done and now - self.said >= self.every:
            self.said = now
            left = round((now - self.began) / done * (self.rounds - done))
            clock = f"{left // 60}:{left % 60:02d}"
            print(f"{self.name} {done}/{self.rounds}  {clock} left", file=sys.stderr, flush=True)
