"""Batches whose order is a pure function of (seed, epoch, step)."""

from dataclasses import dataclass

import numpy as np
import torch

from polyhead.errors import DataError
from polyhead.train.corpus import Tokens
from polyhead.train.objectives import LanguageBatch


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of `context` + 1 tokens in an order that is arithmetic on (seed, epoch, index).

    An epoch starts at its own random phase and visits every window once, in its own order. The
    n-th row of the run is window `n % len` of epoch `n // len`: resuming needs only n.
    """

    tokens: Tokens
    context: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens.ids) <= self.context:
            raise DataError(
                f"the corpus has {len(self.tokens.ids)} tokens, and a window takes "
                f"{self.context + 1}: add text, or set a context below {len(self.tokens.ids)}"
            )

    def __len__(self) -> int:
        """Windows in an epoch; where several fit, one less than that, to leave the phase room."""
        return max(1, (len(self.tokens.ids) - 1) // self.context - 1)

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where rows first … first + count - 1 of the run begin, in tokens [count]."""
        row = np.arange(first, first + count, dtype=np.uint64)
        epoch, index = row // np.uint64(len(self)), row % np.uint64(len(self))
        room = len(self.tokens.ids) - len(self) * self.context
        phase = _mix(epoch ^ _mix(np.uint64(self.seed))) % np.uint64(min(room, self.context))
        order = _permute(index, len(self), _mix(epoch + _mix(np.uint64(self.seed) + np.uint64(1))))
        return (phase + order * np.uint64(self.context)).astype(np.int64)

    def batch(self, index: int, batch_size: int) -> LanguageBatch:
        """The index-th batch of the run, int64 [batch_size, context]."""
        starts = self.starts(index * batch_size, batch_size)
        return window_batch(self.tokens.ids, starts, self.context)


def window_batch(ids: np.ndarray, starts: np.ndarray, context: int) -> LanguageBatch:
    """Inputs and labels of the windows that begin at `starts`."""
    rows = ids[starts[:, None] + np.arange(context + 1)]
    rows = torch.from_numpy(rows.astype(np.int64))
    return LanguageBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: 64 bits in, 64 well mixed bits out."""
    x = np.atleast_1d(np.asarray(x, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size) at `index`: a Feistel network, walked until inside."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    value = index.copy()
    todo = np.ones(len(index), bool)
    while todo.any():
        left, right = value[todo] >> half, value[todo] & low
        for turn in range(6):
            left, right = right, left ^ (_mix(right + _mix(key[todo] + np.uint64(turn))) & low)
        value[todo] = (left << half) | right
        todo = value >= np.uint64(size)
    return value
