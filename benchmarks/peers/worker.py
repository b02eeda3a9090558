"""One library in a process of its own: requests and answers are lines of JSON over pipes.

    {"do": "open", "job": "decode", "options": {...}}  ->  {"facts": {...}}
    {"do": "slice", "seconds": 2.0}                    ->  {"seconds": 0.9, "calls": 3, ...}
    {"do": "answer"}                                   ->  {"answer": ...}
    {"do": "memory"}                                   ->  {"mib": 45.1}

"seconds" of a slice is the mean of its calls. A library that is not there answers
{"absent": "..."}, what fails {"error": "..."}. A worker sleeps while it is not asked, and ends with
its standard input.
"""

import gc
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import IO, Any

from benchmarks.abba import memory_of
from benchmarks.peers.job import Job

MODULES = {
    "machine": "ceilings",
    "polyhead": "ours",
    "llama.cpp": "llamacpp",
    "transformers": "hf",
    "onnxruntime": "onnx",
    "ctranslate2": "ct2",
    "sentence-transformers": "sentences",
    "litgpt": "lit",
}
"""By the names that `--peers` takes: the modules beside this one that drive them."""

Jobs = Mapping[str, Callable[..., Job]]


class Server:
    """Answers requests about one job at a time."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.job: Job | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One answer to one request."""
        if request["do"] == "open":
            self.job = None
            gc.collect()
            self.job = self.jobs[request["job"]](**request["options"])
            return {"facts": self.job.facts}
        assert self.job is not None, "open a job first"
        if request["do"] == "slice":
            return _slice(self.job, request["seconds"])
        if request["do"] == "answer":
            return {"answer": self.job.answer()}
        if request["do"] == "memory":
            return {"mib": memory_of(self.job.run)}
        raise ValueError(f"{request['do']!r} is no request")


def _slice(job: Job, seconds: float) -> dict[str, Any]:
    """Calls until `seconds` have passed, one at the least."""
    counted: list[float] = []
    for noted in job.notes.values():
        noted.clear()
    began = perf_counter()
    while not counted or perf_counter() - began < seconds:
        counted.append(job.run())
    notes = {name: statistics.median(noted) for name, noted in job.notes.items() if noted}
    return {"seconds": statistics.mean(counted), "calls": len(counted), "notes": notes}


def serve(server: Server, requests: IO[str], answers: IO[str]) -> None:
    """Answer line by line until the requests end."""
    for line in requests:
        try:
            found = server.answer(json.loads(line))
        except ImportError as error:
            found = {"absent": _said(error)}
        except Exception as error:  # a peer may fail in any way, and is then a row that says so
            found = {"error": f"{type(error).__name__}: {_said(error)}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    """Serve the library that the command line names."""
    name = sys.argv[1]
    # Libraries print as they like: our answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        module = importlib.import_module(f"benchmarks.peers.{MODULES[name]}")
    except ImportError as error:
        answers.write(json.dumps({"absent": _said(error)}) + "\n")
        return
    answers.write(json.dumps({"ready": name, "versions": module.versions()}) + "\n")
    answers.flush()
    serve(Server(module.JOBS), sys.stdin, answers)


if __name__ == "__main__":
    main()
