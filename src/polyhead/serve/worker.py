"""The process that holds the models. It speaks over one pipe, and ends when that does."""

import contextlib
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, PolyheadError
from polyhead.serve.messages import Cancel, Done, Job, Plan, Ready, Refused, failure


def main(pipe: Connection, plan: Plan) -> None:
    """Load, say so, and do what is asked until nobody is there to ask."""
    # Ctrl-C reaches every process of a terminal; when to end is for the front to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say = _Sender(pipe)
    try:
        worker = _Worker(plan, say)
    except PolyheadError as error:
        say(Refused(str(error)))
        say.flush()
        return
    worker.tell()
    try:
        worker.answer(pipe)
    finally:
        worker.close()


class _Worker:
    """The models by name, and what serves them."""

    def __init__(self, plan: Plan, say: "_Sender") -> None:
        from polyhead.serve.opened import Opened

        self._plan, self._say = plan, say
        self._opened = {
            name: Opened.of(source, plan.opening, plan.probes)
            for name, source in plan.models.items()
        }
        self._bases: dict[str, str] = {}
        self._services = {
            name: opened.service(name, plan.engine, say) for name, opened in self._opened.items()
        }
        for name, (base, folder) in plan.adapters.items():
            self._adapt(name, base, folder)

    def tell(self) -> None:
        """What is served now."""
        self._say(Ready({name: self._about(name) for name in self._services}))
        self._say.flush()

    def answer(self, pipe: Connection) -> None:
        """Do what is asked, until there is nobody to ask."""
        while True:
            try:
                asked = pipe.recv()
            except (EOFError, OSError):
                return
            if asked is None:
                return
            if isinstance(asked, Cancel) and asked.model in self._services:
                self._services[asked.model].cancel(asked.number)
            elif isinstance(asked, Job):
                self._do(asked)
            self._say.flush()

    def close(self) -> None:
        """End all of them."""
        for service in self._services.values():
            service.close()

    def _do(self, job: Job) -> None:
        try:
            if job.what == "adapt":
                self._adapt(job.given["name"], job.model, job.given["folder"])
                self._changed(job, job.given["name"])
            elif job.what == "drop":
                self._drop(job.model)
                self._changed(job, job.model)
            else:
                self._services[job.model].do(job.number, job.what, job.given, self._say)
        # Whatever a model raises is for the one who asked; the others go on.
        except Exception as error:
            told = failure(job.number, error)
            if told.is_ours:
                words = f"polyhead: request {job.number}: {told.message}"
                print(words, file=sys.stderr, flush=True)
            self._say(told)

    def _adapt(self, name: str, base: str, folder: str) -> None:
        opened = self._opened[base]
        if base in self._bases or not opened.writes:
            raise ConfigError(f"adapters go on models that write, and {base} is none of them")
        own = opened.adapted(Path(folder), self._plan.probes)
        self._services[name] = own.service(name, self._plan.engine, self._say)
        self._opened[name], self._bases[name] = own, base

    def _drop(self, name: str) -> None:
        if name not in self._bases:
            raise ConfigError(f"{name} is no adapter; models stay as long as the server runs")
        del self._opened[name], self._bases[name]
        self._services.pop(name).close()

    def _changed(self, job: Job, name: str) -> None:
        self.tell()
        self._say(Done(job.number, {"name": name}))

    def _about(self, name: str) -> dict[str, Any]:
        held = {"weight_bytes": self._opened[name].num_bytes}
        parent = {"parent": self._bases[name]} if name in self._bases else {}
        return self._services[name].about() | held | parent


class _Sender:
    """Says things from any thread; they are kept until somebody flushes, and go together.

    Where the front is slow to read, whoever flushes waits.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._said, self._lock = pipe, list[Any](), threading.Lock()

    def __call__(self, what: Any) -> None:
        self._said.append(what)

    def flush(self) -> None:
        """Send what was said since the last time."""
        with self._lock, contextlib.suppress(OSError):  # nobody listens any more
            if self._said:
                batch, self._said = self._said, []
                self._pipe.send(batch)
