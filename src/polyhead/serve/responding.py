"""The routes of `/v1/responses`."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError

from polyhead.serve.backend import Backend
from polyhead.serve.background import Background, Event, as_events, last_response
from polyhead.serve.errors import ApiError, telling
from polyhead.serve.protocol import Chat
from polyhead.serve.responses import Responding, Response
from polyhead.serve.streams import Answers, begun, streaming, whole


def add(app: FastAPI, backend: Backend, background: Background) -> None:
    """The routes. background: keeps answers that go on while nobody listens."""

    @app.post("/v1/responses")
    async def responses(body: Response, request: Request) -> Any:
        """The next message of a conversation, in OpenAI's newer words."""
        if body.store and not body.background:
            raise ApiError(400, "only background answers are stored; leave store out", "store")
        asked, told = _as_chat(body), Responding(body)
        answers = backend.answers(asked.model, "write", asked.given(stream=True))
        if body.background:
            # Its name is told at once, so that whoever leaves before the first word finds it again.
            backend.check(asked.model)
            said = told.events(answers)
            kept = background.keep(told.id, _closing(said, answers), _owner(request))
            return streaming(as_events(kept.follow())) if body.stream else told.shell()
        if body.stream:
            return streaming(as_events(told.events(await begun(answers))), answers)
        return told.whole(await whole(answers, request))

    @app.get("/v1/responses/{response_id}")
    async def response(
        response_id: str, request: Request, stream: bool = False, starting_after: int = -1
    ) -> Any:
        """An answer that goes on in the background, or its events after one."""
        kept = background.find(response_id, _owner(request))
        if stream:
            return streaming(as_events(kept.follow(max(0, starting_after + 1))))
        return last_response(kept)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str, request: Request) -> Any:
        """End it as far as it came."""
        kept = background.find(response_id, _owner(request))
        was_done = bool(kept.ended)
        await kept.cancel()
        found = last_response(kept)
        return found if was_done else {**found, "status": "cancelled"}


async def _closing(said: AsyncGenerator[Event], answers: Answers) -> AsyncGenerator[Event]:
    try:
        async for event in said:
            yield event
    finally:
        await said.aclose()
        await answers.aclose()


def _owner(request: Request) -> str | None:
    return getattr(request.state, "owner", None)


def _as_chat(body: Response) -> Chat:
    """Errors: ApiError for what the older route's fields would not take."""
    try:
        return body.chat()
    except ValidationError as error:
        first = telling(error.errors())
        raise ApiError(400, f"input: {first['msg']}", "input", str(first["type"])) from None
