"""What goes wrong, in OpenAI's shape. Nothing of a stack, a path or an address gets into it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\\S+|0x[0-9a-fA-F]{6,}")


class ApiError(Exception):
    """An answer that is an error.

    param: the field that is at fault. code: a word for programs. headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message, self.headers = cleaned(message), dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": self.message, "type": TYPES.get(self.status, usual)}
        return {"error": {**said, "param": self.param, "code": self.code}}

    def event(self, number: int) -> str:
        """The data of an event that ends an answer of `/v1/responses`."""
        said = {"type": "error", "sequence_number": number, "message": self.message}
        return json.dumps({**said, "param": self.param, "code": self.code})


def telling(errors: Sequence[Any]) -> Any:
    """The first that says more than that a field is of another kind, or the first."""
    return next((one for one in errors if not str(one["type"]).endswith("_type")), errors[0])


def cleaned(message: str) -> str:
    """A message of one line, without paths and addresses."""
    return _PATH.sub("[...]", " ".join(message.split()))[:500]


def busy(waiting: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        429, f"{waiting} requests wait already; try again in a moment", code="queue_full",
        headers={"Retry-After": "1"},
    )  # fmt: skip


def lost() -> ApiError:
    """The worker ended with this request."""
    return ApiError(
        503, "the model's process ended and is started again; try again in a moment",
        code="worker_lost", headers={"Retry-After": "5"},
    )  # fmt: skip


def not_ready(is_draining: bool) -> ApiError:
    """Models are loading, or the server ends."""
    said = "the server is ending" if is_draining else "the models are being loaded"
    return ApiError(
        503, f"{said}; try again in a moment", code="not_ready", headers={"Retry-After": "5"}
    )


def late(seconds: float) -> ApiError:
    """It took too long."""
    return ApiError(408, f"the answer took more than {seconds:g} seconds", code="timeout")
