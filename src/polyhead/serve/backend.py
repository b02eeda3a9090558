"""The front's end of the pipe: jobs out, what comes of them in, and a worker that comes back."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from polyhead.errors import ConfigError
from polyhead.serve.errors import ApiError, busy, late, lost, not_ready
from polyhead.serve.messages import Cancel, Done, Failed, Job, Piece, Plan, Ready, Refused, Stats
from polyhead.serve.metrics import Metrics
from polyhead.serve.wire import Wire

_AGAIN_S = (0.0, 1.0, 5.0, 30.0)  # before a start that follows so many that ended at once


class Backend:
    """One worker, started again when it ends, and the requests that wait for it.

    room: requests that may be on their way, at work and waiting. timeout: seconds that one may
    take. Everything here runs in one event loop.
    """

    def __init__(self, plan: Plan, room: int, timeout: float = 600.0) -> None:
        self.plan, self.room, self.timeout = plan, room, timeout
        self.metrics = Metrics()
        self.models: Mapping[str, Mapping[str, Any]] = {}
        self.restarts = 0
        self.is_draining = False
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[Any]] = {}
        self._ready = asyncio.Event()
        self._refused: str | None = None
        self._wire: Wire | None = None
        self._is_closing = False
        self._soon: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the worker has its models and takes requests."""
        return self._ready.is_set() and not self.is_draining

    @property
    def at_work(self) -> int:
        """Requests on their way."""
        return len(self._waiting)

    async def start(self) -> None:
        """Start the worker and wait for its models. Errors: ConfigError that says why not."""
        self._begin()
        await self._ready.wait()
        if self._refused is not None:
            raise ConfigError(self._refused)

    async def answers(
        self, model: str, what: str, given: Mapping[str, Any]
    ) -> AsyncGenerator[Piece | Done]:
        """What comes of a job, piece by piece; the last is `Done`. Left early, it is cancelled.

        Errors: ApiError where there is no room, no worker, or the worker says so.
        """
        if len(self._waiting) >= self.room:
            raise busy(len(self._waiting))
        if not self.is_ready:
            raise not_ready(self.is_draining)
        self.check(model)
        number, queue = next(self._numbers), asyncio.Queue[Any]()
        self._waiting[number], watch = queue, self.metrics.watch(model)
        is_done, end = False, asyncio.get_running_loop().time() + self.timeout
        try:
            self._send(Job(number, model, what, given))
            while not is_done:
                async with asyncio.timeout_at(end):
                    told = await queue.get()
                is_done = not isinstance(told, Piece)
                if isinstance(told, ApiError):
                    raise told
                if isinstance(told, Failed):
                    raise _as_error(told)
                if isinstance(told, Done):
                    watch.done(told.result)
                else:
                    watch.piece(told.choice)
                yield told
        except TimeoutError:
            watch.failed(408)
            raise late(self.timeout) from None
        except ApiError as error:
            watch.failed(error.status)
            raise
        finally:
            del self._waiting[number]
            if not is_done:
                self._send(Cancel(number, model))

    def check(self, name: str) -> None:
        """ApiError for a model that is not there."""
        if name not in self.models:
            there = ", ".join(self.models) or "none yet"
            raise ApiError(
                404, f"there is no model {name!r}; there is {there}", "model", "model_not_found"
            )

    async def result(self, model: str, what: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a job came to."""
        async for told in self.answers(model, what, given):
            if isinstance(told, Done):
                return told.result
        raise lost()

    async def adapt(self, name: str, base: str, folder: str) -> None:
        """Serve a model with an adapter by a name of its own. Errors: ApiError for a name taken."""
        if name in self.models:
            raise ApiError(400, f"{name!r} is served already; choose another name", "lora_name")
        await self.result(base, "adapt", {"name": name, "folder": folder})
        adapters = {**self.plan.adapters, name: (base, folder)}
        self.plan = replace(self.plan, adapters=adapters)

    async def drop(self, name: str) -> None:
        """Serve an adapter no longer; texts that it is at end as far as they came."""
        await self.result(name, "drop", {})
        adapters = {each: of for each, of in self.plan.adapters.items() if each != name}
        self.plan = replace(self.plan, adapters=adapters)

    async def drain(self, grace: float) -> None:
        """Take nothing more, and wait so many seconds for what is at work."""
        self.is_draining = True
        end = asyncio.get_running_loop().time() + grace
        while self._waiting and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the worker."""
        self._is_closing = True
        if self._wire is not None:
            await self._wire.close()

    def _begin(self) -> None:
        self._wire = Wire(self.plan, self._take, self._end)

    def _take(self, batch: list[Any]) -> None:
        for told in batch:
            if isinstance(told, Ready):
                self.models = told.models
                self._ready.set()
            elif isinstance(told, Stats):
                self.metrics.stand(told)
            elif isinstance(told, Refused):
                self._refused = told.message
                self._is_closing = True
                self._ready.set()
            elif (queue := self._waiting.get(told.number)) is not None:
                queue.put_nowait(told)

    def _end(self) -> None:
        """The worker is gone: those who wait hear of it, and another is started."""
        if self._is_closing:
            return
        early = not self._ready.is_set()
        self._ready.clear()
        for queue in self._waiting.values():
            queue.put_nowait(lost())
        self.restarts += 1
        self.metrics.lost()
        wait = _AGAIN_S[min(self.restarts, len(_AGAIN_S) - 1)] if early else 0.0
        self._soon = asyncio.get_running_loop().create_task(self._again(wait))

    async def _again(self, wait: float) -> None:
        await asyncio.sleep(wait)
        if not self._is_closing:
            self._begin()

    def _send(self, what: Job | Cancel) -> None:
        if self._wire is None:
            raise lost()
        self._wire.send(what)


def _as_error(told: Failed) -> ApiError:
    if told.is_ours:
        return ApiError(500, "something went wrong with this request; it is in the server's log")
    return ApiError(400, told.message, told.param)
