"""What stands before every route: request ids, keys, limits of size, and a line in the log."""

import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from polyhead.errors import FileError
from polyhead.serve.errors import ApiError

OPEN = frozenset({"/health", "/ready"})
"""What is answered without a key."""
_ID = re.compile(r"[\w.:-]{1,128}")
_LOG = logging.getLogger("polyhead.serve")


class Keys:
    """API keys from a file, one a line, with a name before each where there is one.

    The file is read again when it changes, so that keys are rotated by writing it.
    Errors: FileError where it cannot be read at first, or holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self._keys = path, (0, 0), dict[str, str]()
        try:
            self._look()
        except OSError as error:
            raise FileError(f"cannot read the keys in {path}: {error.strerror}") from None
        if not self._keys:
            raise FileError(f"{path} holds no key; write one a line")

    def owner(self, key: str) -> str | None:
        """Whose key it is; None for one that is not there. Every key is compared, in equal time."""
        try:
            self._look()
        except OSError:
            _LOG.warning("the file of keys cannot be read; those of before hold")
        found = None
        for own, name in self._keys.items():
            if hmac.compare_digest(own.encode(), key.encode()):
                found = name
        return found

    def _look(self) -> None:
        stat = os.stat(self._path)
        if (stat.st_mtime_ns, stat.st_size) == self._seen:
            return
        keys: dict[str, str] = {}
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines()):
            words = line.partition("#")[0].split()
            if words:
                keys[words[-1]] = words[0] if len(words) > 1 else f"key {number + 1}"
        self._keys, self._seen = keys, (stat.st_mtime_ns, stat.st_size)


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: Any, keys: Keys | None, max_body: int) -> None:
        self.app, self.keys, self.max_body = app, keys, max_body

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

        try:
            scope["state"]["owner"] = self._owner(scope["path"], headers)
            await self.app(scope, self._limited(receive, headers), answer)
        except ApiError as error:
            await refuse(error, answer)
        except HTTPException as error:
            await refuse(ApiError(error.status_code, error.detail), answer)
        finally:
            line = {
                "request": request_id, "method": scope["method"], "path": scope["path"],
                "status": status, "seconds": round(time.perf_counter() - began, 4),
            }  # fmt: skip
            _LOG.info(json.dumps(line | {"key": scope["state"].get("owner")}))

    def _owner(self, path: str, headers: Mapping[bytes, str]) -> str | None:
        if self.keys is None or path in OPEN:
            return None
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        owner = self.keys.owner(key.strip()) if kind.lower() == "bearer" else None
        if owner is None:
            raise ApiError(
                401, "this server wants a key: send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
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
