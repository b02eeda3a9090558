"""The routes, over a backend."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from polyhead.serve import adapters, page, responding, tasks
from polyhead.serve.backend import Backend
from polyhead.serve.background import Background
from polyhead.serve.config import ServeConfig
from polyhead.serve.errors import ApiError, telling
from polyhead.serve.guard import Guard
from polyhead.serve.keys import Keys
from polyhead.serve.protocol import Chat, Completion, Detokenize, Drawing, Tokenize
from polyhead.serve.streams import begun, streaming, whole
from polyhead.serve.texts import ChatShape, CompletionShape, Shape, answered, events
from polyhead.serve.upstream import Upstreams, WayOn, read_upstreams


def create(config: ServeConfig, backend: Backend) -> Any:
    """The application; it ends the backend, which is started beside it."""

    upstreams = None
    if config.upstreams is not None:
        upstreams = Upstreams(read_upstreams(Path(config.upstreams)), config.timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if upstreams is not None:
            await upstreams.close()
        await backend.drain(config.grace)
        await background.close()
        await backend.close()

    background = Background()
    app = FastAPI(title="Polyhead", lifespan=lifespan, docs_url=None, redoc_url=None)
    _errors(app)
    _state(app, backend, [] if upstreams is None else upstreams.cards())
    _texts(app, backend)
    _tokens(app, backend)
    tasks.add(app, backend)
    page.add(app)
    responding.add(app, backend, background)
    adapters.add(app, backend, None if config.adapters is None else Path(config.adapters))
    keys = None if config.keys is None else Keys(Path(config.keys))
    inner = app if upstreams is None else WayOn(app, upstreams)
    guarded = Guard(inner, keys, config.max_body)
    if not config.cors:
        return guarded
    # Outermost, as browsers ask first whether they may ask, without a key.
    return CORSMiddleware(
        guarded, config.cors, allow_methods=("GET", "POST"), allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )  # fmt: skip


def _state(app: FastAPI, backend: Backend, others: Sequence[dict[str, Any]]) -> None:
    began = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server itself answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken: 503 while models load, or while it ends."""
        status = "ready" if backend.is_ready else "draining" if backend.is_draining else "loading"
        return JSONResponse({"status": status}, 200 if backend.is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """Counts for Prometheus, by vLLM's names."""
        return PlainTextResponse(backend.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [*(_card(name) for name in backend.models), *others]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        backend.check(name)
        return _card(name)

    def _card(name: str) -> dict[str, Any]:
        about = dict(backend.models[name])
        return {"id": name, "object": "model", "created": began, "owned_by": "polyhead", **about}


def _tokens(app: FastAPI, backend: Backend) -> None:
    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> Any:
        """The ids of a text, or of a conversation by the model's template."""
        return await backend.result(body.model, "tokenize", body.given())

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Any:
        """The text of ids."""
        return await backend.result(body.model, "detokenize", {"tokens": body.tokens})


def _texts(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Any:
        """Text that goes on from prompts."""
        given = {
            "prompts": body.prompts(), "settings": body.settings(), "n": body.n,
            "stream": body.stream,
        }  # fmt: skip
        return await write(CompletionShape(), body, given, body.logprobs is not None, request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Any:
        """The next message of a conversation."""
        return await write(ChatShape(), body, body.given(), body.logprobs, request)

    async def write(
        shape: Shape, body: Drawing, given: dict[str, Any], logs: bool, request: Request
    ) -> Any:
        answers = backend.answers(body.model, "write", given)
        if not body.stream:
            return answered(shape, body.model, await whole(answers, request))
        counts = body.stream_options is not None and body.stream_options.include_usage
        said = events(shape, body.model, await begun(answers), counts, logs)
        return streaming((f"data: {data}\n\n" async for data in said), answers)


def _errors(app: FastAPI) -> None:
    def told(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> JSONResponse:
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = telling(error.errors())
        # Where a field may be of several kinds, the name of a kind stands among those of fields.
        place = [
            str(part) for part in first["loc"] if str(part).isidentifier() or part in range(2**20)
        ]
        param = ".".join(place[1:]) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return told(ApiError(400, message, param, str(first["type"])))

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return told(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return told(ApiError(500, "something went wrong with this request; it is in the log"))
