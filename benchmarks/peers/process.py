"""Whole processes as jobs: what a person waits for on a command line."""

import subprocess
import sys
from time import perf_counter

from benchmarks.peers.job import Job


def command(arguments: list[str]) -> Job:
    """This Python with arguments, from start to end; answers what it prints."""

    def once() -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    def run() -> float:
        began = perf_counter()
        once()
        return perf_counter() - began

    return Job(run, once)
