"""The process that holds the models. It speaks over one pipe, and ends when that does."""

import contextlib
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from polyhead.errors import PolyheadError
from polyhead.serve.messages import Cancel, Job, Plan, Ready, Refused, Service, failure


def main(pipe: Connection, plan: Plan) -> None:
    """Load, say so, and do what is asked until nobody is there to ask."""
    # Ctrl-C reaches every process of a terminal; when to end is for the front to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say = _Sender(pipe)
    try:
        services = {name: opened(name, plan, say) for name in plan.models}
    except PolyheadError as error:
        say(Refused(str(error)))
        say.flush()
        return
    say(Ready({name: service.about() for name, service in services.items()}))
    say.flush()
    try:
        _answer(pipe, services, say)
    finally:
        for service in services.values():
            service.close()


def opened(name: str, plan: Plan, say: "_Sender") -> Service:
    """What serves the model of this name."""
    from polyhead.adapt.load import tokenizer
    from polyhead.generate.engine_config import EngineConfig
    from polyhead.images import Processor
    from polyhead.kernels import pack
    from polyhead.serve.looking import Looking
    from polyhead.serve.opening import Opening
    from polyhead.serve.reading import Reading
    from polyhead.serve.rewriting import Rewriting
    from polyhead.serve.writing import Writing
    from polyhead.tasks.fit import kind_of
    from polyhead.tasks.looking import READ_IMAGES

    model, path = Opening(**plan.opening).open_model(plan.models[name], writes=True)
    kind, writes = kind_of(model), model.head_kind == "lm"
    processor = Processor.load(path) if kind in READ_IMAGES else None
    words = None if kind == "vision" else tokenizer(path)
    if kind in ("decoder", "image-text") and writes:
        assert words is not None
        return Writing(name, model, words, EngineConfig(**plan.engine), say, processor)
    if kind == "encoder-decoder" and writes:
        assert words is not None
        return Rewriting(model, words, say.flush)
    laid_out = pack(model) if model.device.type == "cpu" else model
    if processor is not None:
        return Looking(laid_out, processor, words, say.flush)
    assert words is not None
    return Reading(laid_out, words, say.flush)


def _answer(pipe: Connection, services: Mapping[str, Service], say: "_Sender") -> None:
    while True:
        try:
            asked = pipe.recv()
        except (EOFError, OSError):
            return
        if asked is None:
            return
        if isinstance(asked, Cancel):
            services[asked.model].cancel(asked.number)
        elif isinstance(asked, Job):
            _do(services[asked.model], asked, say)
        say.flush()


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
