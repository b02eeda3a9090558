"""What the front and the worker say to each other: plain values, over one pipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from polyhead.errors import PolyheadError


@dataclass(frozen=True)
class Plan:
    """What a worker loads. models: served name to what `Opening` opens; opening, engine: fields.

    adapters: served name to the name of a model, and the directory of what is put on it. probes:
    whether models must answer as they did when they were saved.
    """

    models: Mapping[str, str]
    opening: Mapping[str, Any] = field(default_factory=dict[str, Any])
    engine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    probes: bool = True
    adapters: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])


@dataclass(frozen=True)
class Job:
    """Something to do for one request. what: one of the works of the model's service."""

    number: int
    model: str
    what: str
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this any longer."""

    number: int
    model: str


@dataclass(frozen=True)
class Piece:
    """More of the text of one choice, what is known of its tokens, and tools that it calls."""

    number: int
    choice: int
    text: str
    logprobs: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Done:
    """What came of a job."""

    number: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """Why nothing came of it. is_ours: a fault of the server, of which nothing is told."""

    number: int
    message: str
    param: str | None = None
    is_ours: bool = False


@dataclass(frozen=True)
class Stats:
    """How the engine of a model stands. cache: share of keys and values that are held."""

    model: str
    running: int
    waiting: int
    cache: float


@dataclass(frozen=True)
class Ready:
    """All models are loaded: what each can do, by its served name."""

    models: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Refused:
    """A model cannot be served, and why."""

    message: str


class Sender(Protocol):
    """Says things, which go out together when it is flushed."""

    def __call__(self, what: Any) -> None:
        """Keep it until then."""
        ...

    def flush(self) -> None:
        """Send what was said."""
        ...


class Service(Protocol):
    """A model at work. Jobs are answered by `say`, from any thread, now or later."""

    def about(self) -> dict[str, Any]:
        """What it can do, for those who ask for models."""
        ...

    def do(self, number: int, what: str, given: Mapping[str, Any], say: Any) -> None:
        """A job. What it raises is an answer, too."""
        ...

    def cancel(self, number: int) -> None:
        """Let go of a job."""
        ...

    def close(self) -> None:
        """End."""
        ...


def failure(number: int, error: Exception) -> Failed:
    """What may be told of an error: all of the user's, nothing of ours."""
    if isinstance(error, PolyheadError):
        return Failed(number, str(error))
    return Failed(number, f"{type(error).__name__}: {error}", is_ours=True)
