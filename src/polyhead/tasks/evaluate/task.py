"""What tasks over local files share: their settings, and how a model works at them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from polyhead.errors import ConfigError, FileError
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.result import Metric
from polyhead.tasks.evaluate.scorer import MOST_TOKENS, Scorer
from polyhead.text.tokenizer import Tokenizer

T = TypeVar("T")
Record = Mapping[str, Any]
"""What is known of one sample: plain data, as it is written to a line of JSON."""

_BATCHES_A_CHUNK = 4  # so that rows of like length find each other


@dataclass(frozen=True)
class Worker:
    """A model at work. most_tokens: of a batch."""

    model: TaskModel
    tokenizer: Tokenizer
    most_tokens: int = MOST_TOKENS

    @cached_property
    def scorer(self) -> Scorer:
        """What the model holds likely."""
        return Scorer(self.model, self.tokenizer, most_tokens=self.most_tokens)

    def chunks(self, items: Sequence[T], size: Callable[[T], int]) -> Iterator[Sequence[T]]:
        """Items in their order, as many at a time as a stopped run may lose; `size` in tokens.

        A few at first, for the time left to be known soon.
        """
        start, tokens, room = 0, 0, self.most_tokens
        for end, item in enumerate(items, 1):
            tokens += size(item)
            if tokens >= room or end == len(items):
                yield items[start:end]
                start, tokens, room = end, 0, self.most_tokens * _BATCHES_A_CHUNK


class Sample(NamedTuple):
    """One of a task's questions. size: tokens that it is worth. asked: what the task needs."""

    size: int
    asked: Any


class Unit(NamedTuple):
    """What is drawn as a whole for an interval; `above / below` over all is the figure.

    key: tells which of another model's units is its pair.
    """

    key: Any
    above: float
    below: float


@dataclass(frozen=True)
class LocalTask:
    """A task over a file. columns: `{"question": "ctx"}` where the file's own names are others."""

    kind: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    path: Path
    columns: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        for name in self.columns:
            if name not in self.reads:
                raise ConfigError(
                    f"columns has {name!r}; {self.kind} reads {', '.join(self.reads)}"
                )

    def check(self) -> None:
        """Raise FileError where the file is not there."""
        if not self.path.is_file():
            raise FileError(f"{self.path} is no file; name one that is there")

    @property
    def name(self) -> str:
        """As the command line writes it: `choices=quiz.jsonl`."""
        return f"{self.kind}={self.path}"

    def settings(self) -> dict[str, Any]:
        """All fields but the path, as plain data."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        del named["path"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in named.items()
        }

    def samples(self, worker: Worker) -> Sequence[Sample]:
        """All that the file asks, checked. Errors: DataError naming the row."""
        raise NotImplementedError

    def answer(self, worker: Worker, samples: Sequence[Sample]) -> list[Record]:
        """A record for each of some samples."""
        raise NotImplementedError

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        """The figures over all records."""
        raise NotImplementedError

    def units(self, records: Sequence[Record]) -> dict[str, list[Unit]]:
        """What each metric is a ratio of sums over."""
        raise NotImplementedError

    def note(self, records: Sequence[Record]) -> str:
        """What a reader should know of the intervals."""
        return ""


def whole(task: LocalTask, name: str, least: int) -> None:
    """ConfigError for a field that is no whole number of at least `least`."""
    value = getattr(task, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
