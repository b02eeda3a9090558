"""The front's end of the pipe: a worker process, and two threads that speak with it."""

import asyncio
import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from polyhead.serve.messages import Plan


class Wire:
    """One worker process, heard and told without keeping the event loop waiting.

    An event loop that watched the pipe itself would make it non-blocking, and a message larger
    than the pipe's buffer would look like its end. heard: takes each batch, ended: hears of the
    end once; both in the event loop that makes the wire.
    """

    def __init__(
        self, plan: Plan, heard: Callable[[list[Any]], None], ended: Callable[[], None]
    ) -> None:
        self._loop, self._heard, self._ended = asyncio.get_running_loop(), heard, ended
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, plan), name="polyhead-worker", daemon=True
        )
        self._process.start()
        theirs.close()
        for does in (self._hear, self._speak):
            threading.Thread(target=does, name=f"polyhead{does.__name__}", daemon=True).start()

    def send(self, what: Any) -> None:
        """Say something to the worker. One that has ended does not hear it; `ended` tells."""
        self._out.put(what)

    async def close(self, wait: float = 5.0) -> None:
        """Let the worker end, and kill it after so many seconds."""
        self._out.put(None)
        await asyncio.to_thread(self._process.join, wait)
        if self._process.is_alive():
            self._process.kill()

    def _hear(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._tell(self._heard, self._pipe.recv())
        self._out.put(None)
        self._tell(self._ended)

    def _speak(self) -> None:
        with contextlib.suppress(OSError):
            while (what := self._out.get()) is not None:
                self._pipe.send(what)
            self._pipe.send(None)

    def _tell(self, what: Callable[..., None], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before the worker
            self._loop.call_soon_threadsafe(what, *given)


def _work(pipe: Connection, plan: Plan) -> None:
    """Where the worker begins; the front itself goes without torch."""
    from polyhead.serve.worker import main

    main(pipe, plan)
