"""Batches whose order is a pure function of (seed, epoch, step)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from polyhead.errors import DataError
from polyhead.train.config import TrainConfig
from polyhead.train.corpus import load_tokens
from polyhead.train.objectives import IGNORE, LanguageBatch, PackedBatch
from polyhead.train.order import mix, permute
from polyhead.train.sources import Source
from polyhead.train.tokens import Ids, Progress, Tokens

Split = Literal["train", "valid", "all"]
"""What to learn from (all of a source but `config.held_out` of it), that share, or the whole of a
source that is there to be validated on."""


SORTED = 16  # steps among which rows are sorted by length


class Dataset(Protocol):
    """Rows in an order that is arithmetic: the n-th row of a run is a function of (seed, n)."""

    @property
    def digest(self) -> str:
        """What tells it from other data, tokenizers and settings."""
        ...

    def __len__(self) -> int:
        """Rows of an epoch; each epoch has every row once."""
        ...

    def batch(self, index: int, batch_size: int) -> Any:
        """Rows index * batch_size … of the run: a value with `tokens()` and `to(device)`."""
        ...


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows through a collator, each epoch in its own order.

    rows: anything with a length and rows by number. collate: a list of rows to a batch. lengths:
    of the rows `[N]`; steps then hold rows of like length, so that little is padding: as many rows
    as `SORTED` steps take are sorted and cut, and the steps come in an order of their own. step:
    the rows of one, which do not change with the batches it is cut into; 0 where it is a batch.
    """

    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    seed: int
    digest: str
    lengths: np.ndarray | None = None
    step: int = 0

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise DataError("there are no rows to learn from: give a file that holds some")

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, first: int, count: int) -> np.ndarray:
        """Which rows are first … first + count - 1 of the run [count]."""
        row = np.arange(first, first + count, dtype=np.uint64)
        epoch, index = row // np.uint64(len(self)), row % np.uint64(len(self))
        key = mix(epoch + mix(np.uint64(self.seed) + np.uint64(1)))
        return permute(index, len(self), key).astype(np.int64)

    def batch(self, index: int, batch_size: int) -> Any:
        """The index-th batch of the run."""
        size = self.step if self.step and self.step % batch_size == 0 else batch_size
        # A small part of an epoch is sorted, so that its steps stay a fair sample of it.
        count = min(SORTED, len(self) // (8 * size))
        if self.lengths is None or count < 2:
            chosen = self.order(index * batch_size, batch_size)
        else:
            step, part = divmod(index, size // batch_size)
            chosen = self._of_like_length(self.lengths, step, size, count)
            chosen = chosen[part * batch_size : (part + 1) * batch_size]
        return self.collate([self.rows[row] for row in chosen.tolist()])

    def _of_like_length(self, lengths: np.ndarray, step: int, size: int, count: int) -> np.ndarray:
        group, place = divmod(step, count)
        rows = self.order(group * count * size, count * size)
        steps = rows[np.argsort(lengths[rows], kind="stable")].reshape(count, size)
        key = mix(np.uint64(group) + mix(np.uint64(self.seed) + np.uint64(3)))
        return steps[int(permute(np.array([place], np.uint64), count, key)[0])]


def split_rows(count: int, held_out: float, seed: int, split: Split) -> np.ndarray:
    """Row numbers of one side, in order; the held-out ones are drawn by `seed`, at least one.

    Files are often sorted, by label for one, so that their last rows stand for little.
    """
    everything = np.arange(count)
    if split == "all":
        return everything
    held = min(count - 1, max(1, round(held_out * count))) if held_out else 0
    key = np.broadcast_to(mix(np.uint64(seed)), count)
    drawn = permute(everything.astype(np.uint64), count, key)[:held].astype(np.int64)
    return np.sort(drawn) if split == "valid" else np.setdiff1d(everything, drawn)


def once(dataset: Dataset, batch_size: int, batches: int = 0) -> Iterator[Any]:
    """Every row of an epoch once, or the first `batches` batches of it."""
    own: Any = getattr(dataset, "once", None)
    if own is not None:  # one that is made of several
        yield from own(batch_size, batches)
        return
    rows = len(dataset) if batches == 0 else min(len(dataset), batches * batch_size)
    done = 0
    while done < rows:
        # A batch's rows begin at a multiple of its size, so what is left at the end takes
        # batches of a size that divides what is done.
        size = next(n for n in range(min(batch_size, rows - done), 0, -1) if done % n == 0)
        yield dataset.batch(done // size, size)
        done += size


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `context` + 1 tokens in an order that is arithmetic on (seed, epoch, index).

    An epoch starts at its own random phase and visits every window once, in its own order. The
    n-th row of the run is window `n % len` of epoch `n // len`: resuming needs only n.
    by_document: a token sees its own document alone, at places that begin with it, and the first
    token of a document is nobody's to predict.
    """

    tokens: Tokens
    context: int
    seed: int
    by_document: bool = False

    def __post_init__(self) -> None:
        if self.by_document and self.tokens.ends is None:
            raise DataError("where documents end is not known: give texts, a text each")
        if len(self.tokens.ids) <= self.context:
            raise DataError(
                f"the corpus has {len(self.tokens.ids)} tokens, and a window takes "
                f"{self.context + 1}: add text, or set a context below {len(self.tokens.ids)}"
            )

    @property
    def digest(self) -> str:
        """The corpus and its tokenizer, and whether documents are told apart."""
        return self.tokens.digest + " by document" * self.by_document

    def __len__(self) -> int:
        """Windows in an epoch; where several fit, one less than that, to leave the phase room."""
        return max(1, (len(self.tokens.ids) - 1) // self.context - 1)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where rows first … first + count - 1 of the run begin, in tokens [count]."""
        row = np.arange(first, first + count, dtype=np.uint64)
        epoch, index = row // np.uint64(len(self)), row % np.uint64(len(self))
        room = len(self.tokens.ids) - len(self) * self.context
        phase = mix(epoch ^ mix(np.uint64(self.seed))) % np.uint64(min(room, self.context))
        order = permute(index, len(self), mix(epoch + mix(np.uint64(self.seed) + np.uint64(1))))
        return (phase + order * np.uint64(self.context)).astype(np.int64)

    def batch(self, index: int, batch_size: int) -> LanguageBatch:
        """The index-th batch of the run, int64 [batch_size, context]."""
        starts = self.starts(index * batch_size, batch_size)
        batch = window_batch(self.tokens.ids, starts, self.context)
        return _by_document(batch, self.tokens.ends, starts) if self.by_document else batch


def window_batch(ids: Ids, starts: np.ndarray, context: int) -> LanguageBatch:
    """Inputs and labels of the windows that begin at `starts`."""
    rows = ids[starts[:, None] + np.arange(context + 1)]
    rows = torch.from_numpy(rows.astype(np.int64))
    return LanguageBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _by_document(batch: LanguageBatch, ends: Any, starts: np.ndarray) -> PackedBatch:
    """The same windows, each document in them by itself."""
    places = starts[:, None] + np.arange(batch.input_ids.shape[1])
    owner = np.searchsorted(ends, places, side="right")
    follows = np.searchsorted(ends, places + 1, side="right")
    begins = np.concatenate([[0], ends])[owner]
    labels = batch.labels.masked_fill(torch.from_numpy(owner != follows), IGNORE)
    return PackedBatch(
        batch.input_ids, labels, torch.ones_like(batch.input_ids),
        torch.from_numpy(places - np.maximum(begins, starts[:, None])),
        segments=torch.from_numpy(owner - owner[:, :1]),
    )  # fmt: skip


def windows(
    source: Source,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    progress: Progress | None = None,
    by_document: bool = False,
) -> Windows | None:
    """Windows over a corpus, the last tokens held out; None where it is too short for that.

    by_document: as in `Windows`, of what is learned from.
    """
    cache = Path(config.cache) if config.cache else Path(config.out) / "tokens"
    size: int = model.config.vocab_size
    tokens = load_tokens(source, tokenizer, cache, vocab_size=size, progress=progress)
    if split == "all":
        if len(tokens.ids) < 2:
            raise DataError("the validation text has fewer than 2 tokens: give more of it")
        return Windows(tokens, min(config.context, len(tokens.ids) - 1), config.seed)
    held = max(int(config.held_out * len(tokens.ids)), config.context + 1)
    if config.held_out and len(tokens.ids) - held > config.context:
        tokens = tokens.split(held, tokenizer)[split == "valid"]
    elif split == "valid":
        return None
    return Windows(tokens, config.context, config.seed, by_document and split == "train")


@dataclass(frozen=True)
class TaskBatch:
    """Rows of one task."""

    task: str
    batch: Any
    rows: int

    def tokens(self) -> int:
        """Rows, so that a task counts no more for having more words in one."""
        return self.rows if self.batch.tokens() else 0

    def to(self, device: torch.device) -> "TaskBatch":
        """The same batch on another device."""
        return TaskBatch(self.task, self.batch.to(device), self.rows)


@dataclass(frozen=True, eq=False)
class Mixed:
    """Several datasets, each batch of one of them, as often as it has batches.

    An epoch has every batch of every dataset once, in an order of its own.
    """

    parts: Mapping[str, Dataset]
    seed: int
    digest: str

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def batch(self, index: int, batch_size: int) -> TaskBatch:
        """The index-th batch of the run."""
        counts = [-(-len(part) // batch_size) for part in self.parts.values()]
        epoch, place = divmod(index, sum(counts))
        key = mix(np.uint64(epoch) + mix(np.uint64(self.seed) + np.uint64(2)))
        place = int(permute(np.array([place], np.uint64), sum(counts), key)[0])
        for (task, part), count in zip(self.parts.items(), counts, strict=True):
            if place < count:
                found = part.batch(epoch * count + place, batch_size)
                return TaskBatch(task, found, batch_size)
            place -= count
        raise AssertionError("a place is below the sum of the counts")

    def once(self, batch_size: int, batches: int = 0) -> Iterator[TaskBatch]:
        """Every row of each dataset once, or the first batches of each."""
        for task, part in self.parts.items():
            left = len(part) if batches == 0 else min(len(part), batches * batch_size)
            for batch in once(part, batch_size, batches):
                rows = min(batch_size, left)
                left -= rows
                yield TaskBatch(task, batch, rows)
