"""An engine that runs in a thread of its own, for callers in many."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.prompts import Prompt
from polyhead.generate.request import Request
from polyhead.generate.result import Generation


class _ClosedError(ConfigError):
    """Something is asked of an engine that was closed."""


class Handle:
    """One request on its way: iterate over its text as it comes, or wait for its results.

    Nothing waits for a reader: what is not read is kept, and a handle that is cancelled, or left
    half read by a loop that ends, gives its place to others.
    """

    def __init__(self, front: "EngineThread", request: Request) -> None:
        self._front, self.request = front, request
        self._pieces: SimpleQueue[str | None] = SimpleQueue()  # None ends it
        self._done = threading.Event()
        self._afterwards: list[Callable[[Request], None]] = []
        self._listener, request.on_text = request.on_text, self._hear

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
            self._pieces.put(None)  # whoever iterates again, or from another thread, ends too
        finally:
            self.cancel()
        if self.request.error is not None:
            raise self.request.error

    def results(self, timeout: float | None = None) -> list[Generation]:
        """All texts, once they are done. Errors: the request's own; TimeoutError after `timeout`
        seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the request is not done after {timeout} seconds")
        return self.request.outcome()

    def cancel(self) -> None:
        """End it as far as it came, unless it is done."""
        with contextlib.suppress(_ClosedError):  # which ends it as well
            if not self._done.is_set():
                self._front.call(lambda engine: engine.cancel(self.request))

    def _hear(self, piece: str) -> None:
        self._pieces.put(piece)
        if self._listener is not None:
            self._listener(piece)

    def then(self, call: Callable[[Request], None]) -> None:
        """Call this with the request once it is done, in the engine's thread, or now if it is."""
        self._front.call(lambda _: call(self.request) if self._done.is_set() else self._wait(call))

    def _wait(self, call: Callable[[Request], None]) -> None:
        self._afterwards.append(call)

    def finish(self) -> None:
        """Nothing more comes; the engine's thread says so."""
        self._done.set()
        self._pieces.put(None)
        for call in self._afterwards:
            call(self.request)


class EngineThread:
    """`submit` from any thread; the engine is touched by its own thread alone.

    An error inside a step ends the requests that were at work with it; the next ones are served.
    after: called in the engine's thread after each step, once all was told of it.
    """

    def __init__(self, engine: Engine, after: Callable[[], None] | None = None) -> None:
        self.engine, self._after = engine, after
        self._handles: dict[Request, Handle] = {}
        self._calls: list[tuple[Callable[[Engine], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="polyhead-engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Prompt, config: GenerationConfig | None = None, **named: Any
    ) -> Handle:
        """A request, as for `Engine.add`, whose errors are raised here."""
        handle = Handle(self, self.engine.request(prompt, config, **named))

        def enter(engine: Engine) -> None:
            self._handles[handle.request] = handle
            engine.enter(handle.request)

        self.call(enter)
        return handle

    def call(self, what: Callable[[Engine], Any]) -> Future[Any]:
        """Have the engine's thread do something before its next step; what came of it."""
        done: Future[Any] = Future()
        with self._changed:
            if self._is_closing:
                raise _ClosedError("the engine is closed; start another one")
            self._calls.append((what, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """End what is at work as far as it came, and the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._is_closing:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._calls or self._is_closing or self.engine.has_work
                    )
                self._answer()
                self._step()
                self._deliver()
                if self._after is not None:
                    self._after()
        finally:
            self._end()

    def _answer(self) -> None:
        """Do what was called for; what goes wrong with it is for the one who called."""
        with self._changed:
            calls, self._calls = self._calls, []
        for call, done in calls:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(call(self.engine))
            except Exception as error:
                done.set_exception(error)

    def _step(self) -> None:
        try:
            self.engine.step()
        # Whatever a model raises, those who wait must hear of it.
        except Exception as error:
            self.engine.fail(error)

    def _deliver(self) -> None:
        for request in [request for request in self._handles if request.is_finished]:
            self._handles.pop(request).finish()

    def _end(self) -> None:
        """Nobody waits any longer, in whatever state the engine is."""
        with self._changed:
            self._is_closing = True
        self._answer()
        for request, handle in self._handles.items():
            try:
                self.engine.cancel(request)
            except Exception as error:
                request.error = error
            handle.finish()
