"""What stands before every route: request ids, keys, limits of size, and a line in the log."""

import base64
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from polyhead.serve.errors import ApiError
from polyhead.serve.keys import Allowance, Key, Keys

OPEN = frozenset({"/health", "/ready"})
"""What is answered without a key."""
_OURS = frozenset({"none", "same-origin"})
"""Whose requests a browser's password counts for: other sites' pages send it along, too."""
_ID = re.compile(r"[\w.:-]{1,128}")
_LOG = logging.getLogger("polyhead.serve")


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: Any, keys: Keys | None, max_body: int) -> None:
        self.app, self.keys, self.max_body = app, keys, max_body
        self.allowance = Allowance()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        key = entered = None
        try:
            key = self._key(scope["path"], headers)
            if key is not None:
                self.allowance.enter(key)
            entered = key
            scope["state"]["owner"] = None if key is None else key.name
            await self.app(scope, self._limited(receive, headers), answer)
        except ApiError as error:
            await refuse(error, answer)
        except HTTPException as error:
            await refuse(ApiError(error.status_code, error.detail), answer)
        finally:
            if entered is not None:
                self.allowance.leave(entered)
            line = {
                "request": request_id, "method": scope["method"], "path": scope["path"],
                "status": status, "seconds": round(time.perf_counter() - began, 4),
            }  # fmt: skip
            _LOG.info(json.dumps(line | {"key": None if key is None else key.name}))

    def _key(self, path: str, headers: Mapping[bytes, str]) -> Key | None:
        if self.keys is None or path in OPEN:
            return None
        kind, _, given = headers.get(b"authorization", "").partition(" ")
        owner = None
        if kind.lower() == "bearer":
            owner = self.keys.owner(given.strip())
        elif kind.lower() == "basic" and headers.get(b"sec-fetch-site", "none") in _OURS:
            owner = self.keys.owner(_password(given))
        if owner is None:
            # A browser that opens the page asks for a name and a password, which is the key.
            opens = "text/html" in headers.get(b"accept", "")
            raise ApiError(
                401, "this server wants a key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="polyhead"' if opens else "Bearer"},
            )  # fmt: skip
        return owner

    def _limited(self, receive: Any, headers: Mapping[bytes, str]) -> Any:
        # What reads the body makes a 400 of any other exception.
        too_large = HTTPException(413, f"the request is larger than {self.max_body} bytes")
        said = headers.get(b"content-length", "0")
        if said.isdigit() and int(said) > self.max_body:
            raise too_large
        taken = 0

        async def limited() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise too_large
            return message

        return limited


def _password(given: str) -> str:
    """Of `name:password` in base64; nothing where it is none."""
    try:
        return base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:
        return ""


async def refuse(error: ApiError, send: Any) -> None:
    """Answer with an error."""
    body = json.dumps(error.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    coded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": coded})
    await send({"type": "http.response.body", "body": body})
