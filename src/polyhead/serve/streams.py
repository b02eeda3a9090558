"""Answers as they come, over HTTP: whole where nobody streams, cancelled where nobody waits."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from polyhead.serve.errors import ApiError
from polyhead.serve.messages import Done, Piece

Answers = AsyncGenerator[Piece | Done]


async def whole(answers: Answers, request: Request) -> Any:
    """The result, unless whoever asked goes away; then the job is cancelled."""

    async def last() -> Any:
        async with aclosing(answers):
            return [told async for told in answers][-1].result  # pyright: ignore

    work = asyncio.ensure_future(last())
    try:
        # Polled for, as an answer that nobody waits for keeps others waiting.
        while not work.done():
            await asyncio.wait([work], timeout=0.25)
            if not work.done() and await request.is_disconnected():
                raise ApiError(408, "whoever asked has gone")
        return work.result()
    finally:
        work.cancel()


async def begun(answers: Answers) -> Answers:
    """The same, once the first has come: what is wrong with a request is known before anything is
    said of it."""
    first = await anext(answers)

    async def all_of() -> Answers:
        yield first
        async for told in answers:
            yield told

    return all_of()


def streaming(said: AsyncGenerator[str], answers: Answers | None = None) -> StreamingResponse:
    """Events as they go over the wire. answers: what is closed with them."""
    return StreamingResponse(_sent(said, answers), media_type="text/event-stream")


async def _sent(said: AsyncGenerator[str], answers: Answers | None) -> AsyncGenerator[str]:
    """An error after the first event is the last of them."""
    try:
        async with aclosing(said):
            async for event in said:
                yield event
    except ApiError as error:
        yield f"data: {JSONResponse(error.body()).body.decode()}\n\n"
    finally:
        if answers is not None:
            await answers.aclose()
