"""The process that holds the models. It speaks over one pipe, and ends when that does."""

import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

from polyhead.errors import ConfigError, PolyheadError
from polyhead.serve.messages import Cancel, Job, Plan, Ready, Refused, Service, failure

_END = object()


def main(pipe: Connection, plan: Plan) -> None:
    """Load, say so, and do what is asked until nobody is there to ask."""
    # Ctrl-C reaches every process of a terminal; when to end is for the front to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say = _Sender(pipe)
    try:
        services = {name: opened(model, plan) for name, model in plan.models.items()}
    except PolyheadError as error:
        say(Refused(str(error)))
        say.close()
        return
    say(Ready({name: service.about() for name, service in services.items()}))
    try:
        _answer(pipe, services, say)
    finally:
        for service in services.values():
            service.close()
        say.close()


def opened(name: str, plan: Plan) -> Service:
    """A model and what serves it. Errors: ConfigError for a kind that nothing here serves."""
    from polyhead.generate.engine_config import EngineConfig
    from polyhead.kernels import pack
    from polyhead.serve.opening import Opening
    from polyhead.serve.reading import Reading
    from polyhead.serve.writing import Writing
    from polyhead.tasks.fit import kind_of

    model, tokenizer = Opening(**plan.opening).open(name, writes=True)
    kind = kind_of(model)
    if kind == "decoder" and model.head_kind == "lm":
        return Writing(model, tokenizer, EngineConfig(**plan.engine))
    if kind in ("encoder", "decoder"):
        return Reading(pack(model) if model.device.type == "cpu" else model, tokenizer)
    raise ConfigError(f"{model.config.model_type} is of the kind {kind}, which is not served yet")


def _answer(pipe: Connection, services: Mapping[str, Service], say: "_Sender") -> None:
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(asked, Cancel):
            services[asked.model].cancel(asked.number)
        elif isinstance(asked, Job):
            _do(services[asked.model], asked, say)


def _do(service: Service, job: Job, say: "_Sender") -> None:
    try:
        service.do(job.number, job.what, job.given, say)
    # Whatever a model raises is for the one who asked; the others go on.
    except Exception as error:
        told = failure(job.number, error)
        if told.is_ours:
            print(f"polyhead: request {job.number}: {told.message}", file=sys.stderr, flush=True)
        say(told)


class _Sender:
    """Says things from any thread. What comes while something is sent goes together after it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._said: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="polyhead-say", daemon=True)
        self._thread.start()

    def __call__(self, what: Any) -> None:
        self._said.put(what)

    def close(self) -> None:
        """Once all is sent."""
        self._said.put(_END)
        self._thread.join()

    def _send(self) -> None:
        is_open = True
        while is_open:
            batch = [self._said.get()]
            try:
                while True:
                    batch.append(self._said.get_nowait())
            except Empty:
                pass
            is_open = _END not in batch
            try:
                self._pipe.send([what for what in batch if what is not _END])
            except OSError:
                return
