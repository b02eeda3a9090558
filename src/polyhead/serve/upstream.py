"""Models that are not held here: requests for them go on to another server that speaks OpenAI's."""

import json
import os
import tomllib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx
from fastapi.responses import Response, StreamingResponse

from polyhead.errors import FileError
from polyhead.serve.errors import ApiError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_TOLD = ("content-type", "retry-after", "x-request-id")
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Upstream:
    """Where a model is held. name: it is called here; model: there, None: the same. url: ends with
    /v1. key_env: the environment's variable that holds the key."""

    name: str
    url: str
    model: str | None = None
    key_env: str | None = None

    def headers(self) -> dict[str, str]:
        """What is sent along: the key, never the client's own."""
        key = os.environ.get(self.key_env) if self.key_env else None
        return {"content-type": "application/json"} | (
            {"authorization": f"Bearer {key}"} if key else {}
        )


def read_upstreams(path: Path) -> dict[str, Upstream]:
    """The upstreams of a TOML file, by their names here.

    Errors: FileError for what cannot be read, says what there is not, or names a key that is not
    in the environment.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"cannot read the upstreams in {path}: {error}") from None
    known, found = {field.name for field in fields(Upstream)}, dict[str, Upstream]()
    for number, each in enumerate(said.get("upstream", ())):
        wrong = [*(each.keys() - known), *({"name", "url"} - each.keys())]
        if wrong or not all(isinstance(value, str) for value in each.values()):
            raise FileError(
                f"upstream {number} in {path} has to say name and url, and may say model and "
                f"key_env; see {', '.join(sorted(wrong)) or 'their values'}"
            )
        one = Upstream(**each)
        if one.key_env is not None and not os.environ.get(one.key_env):
            raise FileError(f"upstream {one.name} wants a key in ${one.key_env}, which is not set")
        found[one.name] = one
    if not found:
        raise FileError(f"{path} names no [[upstream]]; write one, or leave the file out")
    return found


class Upstreams:
    """The way on, over connections that are kept. timeout: seconds that an answer may take."""

    def __init__(self, found: Mapping[str, Upstream], timeout: float) -> None:
        self.found = found
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(timeout, connect=_CONNECT_S))

    def cards(self) -> list[dict[str, Any]]:
        """What /v1/models says of them."""
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "upstream",
                "kind": "upstream",
            }
            for name in self.found
        ]

    async def answer(self, path: str, given: bytes) -> Response | None:
        """What the other server says; None for a model that is held here."""
        try:
            body = json.loads(given)
        except ValueError:
            return None  # which the route itself will say
        upstream = self.found.get(str(body.get("model"))) if isinstance(body, dict) else None
        if upstream is None:
            return None
        body["model"] = upstream.model or upstream.name
        url = upstream.url.rstrip("/") + path.removeprefix("/v1")
        asked = self._client.build_request("POST", url, json=body, headers=upstream.headers())
        try:
            found = await self._client.send(asked, stream=True)
        except httpx.HTTPError:
            raise ApiError(
                502, f"the server that holds {upstream.name} does not answer", code="upstream_lost"
            ) from None
        headers = {name: found.headers[name] for name in _TOLD if name in found.headers}
        return StreamingResponse(_bytes(found), found.status_code, headers)

    async def close(self) -> None:
        """Let the connections go."""
        await self._client.aclose()


class WayOn:
    """Stands before the routes, and sends on what is for others."""

    def __init__(self, app: Any, upstreams: Upstreams) -> None:
        self.app, self.upstreams = app, upstreams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_one = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ROUTES
        if not is_one:
            await self.app(scope, receive, send)
            return
        parts, more = list[bytes](), True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        found = await self.upstreams.answer(scope["path"], body)
        if found is not None:
            await found(scope, receive, send)
            return
        again = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def read() -> Any:
            return next(again, None) or await receive()

        await self.app(scope, read, send)


async def _bytes(found: httpx.Response) -> AsyncGenerator[bytes]:
    """As they come; one that breaks off ends what is sent, and a client that goes ends it there."""
    try:
        async for part in found.aiter_bytes():
            yield part
    except httpx.HTTPError:
        return
    finally:
        await found.aclose()
