"""Answers that go on while nobody listens, and are heard again from where somebody left."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from polyhead.serve.errors import ApiError

Event = tuple[str, str]
"""A name and its data."""


class Kept:
    """One answer: its events so far, and whether more come. owner: whose key asked for it."""

    def __init__(self, said: AsyncGenerator[Event], owner: str | None) -> None:
        self.events: list[Event] = []
        self.owner, self.ended = owner, 0.0
        self._changed = asyncio.Condition()
        self._work = asyncio.create_task(self._run(said))

    async def follow(self, start: int = 0) -> AsyncGenerator[Event]:
        """Its events from one on, until the last."""
        while True:
            async with self._changed:
                while len(self.events) <= start and not self.ended:
                    await self._changed.wait()
            if len(self.events) <= start:
                return
            yield self.events[start]
            start += 1

    async def cancel(self) -> None:
        """End it as far as it came."""
        self._work.cancel()
        await asyncio.wait([self._work])

    async def _run(self, said: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(said):
                async for event in said:
                    await self._tell(event)
        except ApiError as error:
            await self._tell(("error", error.event(len(self.events))))
        finally:
            self.ended = time.monotonic()
            await self._tell(None)

    async def _tell(self, event: Event | None) -> None:
        async with self._changed:
            if event is not None:
                self.events.append(event)
            self._changed.notify_all()


class Background:
    """The answers of the last minutes, so many at most."""

    def __init__(self, most: int = 256, seconds: float = 600.0) -> None:
        self._most, self._seconds = most, seconds
        self._kept: dict[str, Kept] = {}

    def keep(self, name: str, said: AsyncGenerator[Event], owner: str | None) -> Kept:
        """Let an answer go on by itself. Errors: ApiError where too many do."""
        self._forget()
        if len(self._kept) >= self._most:
            raise ApiError(429, f"{self._most} answers are kept already; try again later")
        self._kept[name] = Kept(said, owner)
        return self._kept[name]

    def find(self, name: str, owner: str | None) -> Kept:
        """One that was asked for with the same key. Errors: ApiError 404."""
        self._forget()
        found = self._kept.get(name)
        if found is None or found.owner != owner:
            raise ApiError(404, f"there is no answer {name!r}; it may be too old", "response_id")
        return found

    async def close(self) -> None:
        """End them all."""
        for kept in self._kept.values():
            await kept.cancel()

    def _forget(self) -> None:
        """Those that ended long ago; and, of too many, those that ended first."""
        old = time.monotonic() - self._seconds
        ended = sorted((k.ended, name) for name, k in self._kept.items() if k.ended)
        room = len(self._kept) - self._most + 1
        for number, (at, name) in enumerate(ended):
            if at < old or number < room:
                del self._kept[name]


def as_event(event: Event) -> str:
    """As it goes over the wire."""
    return f"event: {event[0]}\ndata: {event[1]}\n\n"


async def as_events(events: AsyncGenerator[Event]) -> AsyncGenerator[str]:
    """The same of many."""
    async with aclosing(events):
        async for event in events:
            yield as_event(event)


def last_response(kept: Kept) -> dict[str, Any]:
    """What an answer has come to: the response of its last event that tells one."""
    texts: list[str] = []
    for _, data in reversed(kept.events):
        said = json.loads(data)
        if "response" in said:
            response = said["response"]
            if texts and not response["output"]:
                item = {"type": "output_text", "text": "".join(reversed(texts)), "annotations": []}
                response["output"] = [{"type": "message", "role": "assistant", "content": [item]}]
            return response
        if said["type"] == "response.output_text.delta":
            texts.append(said["delta"])
    return {}
