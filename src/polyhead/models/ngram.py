"""The baseline that counts: interpolated modified Kneser-Ney, with sorted arrays.

(Chen and Goodman 1999, section 4.1.6.) `T` tokens, `V` vocabulary, `k` the order of an n-gram.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint

Ids = NDArray[np.int64]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """The k-grams of one k: the row of the first k - 1 tokens in the level below, and a token.

    keys: context row * V + token, sorted. counts: of each (continuation counts below the highest
    order). totals, freed: by context row, the counts' sum and the mass that discounting frees.
    discounts: taken off counts of 0, 1, 2 and more.
    """

    keys: Ids
    counts: Ids
    totals: Ids
    freed: Reals
    discounts: Reals


class _Grams(NamedTuple):
    """The k-grams of one k as `_Level.keys`, how often each is there, and the row of its end.

    shorter: the row of the last k - 1 tokens among the grams of that length.
    """

    keys: Ids
    counts: Ids
    shorter: Ids


class NGram:
    """Interpolated modified Kneser-Ney over token ids, of contexts up to `order` - 1 tokens."""

    def __init__(self, vocab_size: int, order: int = 6) -> None:
        if order < 1 or vocab_size < 1:
            raise ConfigError(f"order {order} and vocab_size {vocab_size} must be 1 or more")
        self.vocab_size, self.order = vocab_size, order
        self.levels: list[_Level] = []

    def fit(self, ids: Sequence[int] | Ids | Tensor) -> Self:
        """Count the n-grams of one long text `[T]`; replaces what was counted before."""
        row = self._checked(ids)
        self.levels = self._levels(_count(row, self.vocab_size, self.order))
        return self

    @classmethod
    def best(
        cls,
        ids: Sequence[int] | Ids | Tensor,
        vocab_size: int,
        orders: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
        held_out: float = 0.1,
    ) -> Self:
        """Of the order that predicts the last `held_out` best from the rest; fitted to all."""
        row = cls(vocab_size)._checked(ids)
        at = len(row) - int(held_out * len(row))
        grams = _count(row[:at], vocab_size, max(orders))
        surprise: dict[int, float] = {}
        for order in orders:
            model = cls(vocab_size, order)
            model.levels = model._levels(grams[:order])
            surprise[order] = -float(model.log_probs(row[at:]).sum())
        return cls(vocab_size, min(surprise, key=lambda order: surprise[order])).fit(row)

    def log_probs(self, ids: Sequence[int] | Ids | Tensor) -> Tensor:
        """Natural log-probability `[T]` of each token, given those before it in `ids`; float64."""
        row = self._checked(ids)
        p = np.full(len(row), 1 / self.vocab_size)
        context, known = np.zeros(len(row), np.int64), np.ones(len(row), bool)
        for level in self.levels:
            at, found = _find(level.keys, context * self.vocab_size + row, known)
            p = np.where(known, _mix(level, context, np.where(found, level.counts[at], 0), p), p)
            # The next level's context is the k-gram that ended one token earlier.
            context, known = _shift(at, 0), _shift(found, False)
        return torch.from_numpy(np.log(p))

    def bits_per_byte(self, ids: Sequence[int] | Ids | Tensor, num_bytes: int) -> float:
        """Bits a byte of a text of `num_bytes` bytes whose tokens are `ids`."""
        return -float(self.log_probs(ids).sum()) / math.log(2) / num_bytes

    def next_probs(self, context: Sequence[int]) -> Tensor:
        """The distribution `[V]` of the token after `context`."""
        row = self._checked(context)[len(context) - min(len(context), self.order - 1) :]
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for k, level in enumerate(self.levels[: len(row) + 1]):
            at = self._row_of(row[len(row) - k :])
            if at is None:
                break
            low, high = np.searchsorted(
                level.keys, [at * self.vocab_size, (at + 1) * self.vocab_size]
            )
            counts = np.zeros(self.vocab_size, np.int64)
            counts[level.keys[low:high] % self.vocab_size] = level.counts[low:high]
            p = _mix(level, np.array([at]), counts, p)
        return torch.from_numpy(p)

    def generate(self, prompt: Sequence[int], max_new_tokens: int, seed: int = 0) -> list[int]:
        """Tokens drawn one after the other."""
        random = torch.Generator().manual_seed(seed)
        row = list(prompt)
        for _ in range(max_new_tokens):
            row.append(int(torch.multinomial(self.next_probs(row), 1, generator=random)))
        return row[len(prompt) :]

    def save(self, directory: str | Path, force: bool = False) -> None:
        """`config.json` and `model.safetensors`. FileError where a model is, unless `force`."""
        folder = Path(directory)
        if not force and (folder / "config.json").exists():
            raise FileError(f"{folder} already holds a model; choose another place or use force")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{k}.{name}": torch.from_numpy(value)
            for k, level in enumerate(self.levels)
            for name, value in vars(level).items()
        }
        write_checkpoint(folder, tensors)
        config = {"model_type": "ngram", "vocab_size": self.vocab_size, "order": self.order}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """What `save` wrote. FileError for anything else."""
        folder = Path(directory)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            model = cls(config["vocab_size"], config["order"])
            tensors = open_checkpoint(folder)
            count = len(tensors) // len(_Level.__annotations__)
            model.levels = [
                _Level(**{name: tensors[f"{k}.{name}"].numpy() for name in _Level.__annotations__})
                for k in range(count)
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{folder} holds no n-gram model ({error}); save one there") from None
        return model

    def _levels(self, grams: Sequence[_Grams]) -> list[_Level]:
        """Counts of the longest grams; of the shorter ones, how many tokens stand before each."""
        levels: list[_Level] = []
        below = 1
        for k, (keys, counts, _) in enumerate(grams):
            if k + 1 < len(grams):
                # At least 1: nothing stands before the beginning of the text.
                counts = np.maximum(np.bincount(grams[k + 1].shorter, minlength=len(keys)), 1)
            discounts = _discounts(counts)
            context = keys // self.vocab_size
            totals = np.bincount(context, counts, below).astype(np.int64)
            freed = np.bincount(context, discounts[np.minimum(counts, 3)], below).astype(np.float64)
            levels.append(_Level(keys, counts, totals, freed, discounts))
            below = len(keys)
        return levels

    def _row_of(self, gram: Ids) -> int | None:
        """Where a k-gram stands among those of its length; None where it was not seen."""
        at = 0
        for level, token in zip(self.levels, gram, strict=False):
            key = at * self.vocab_size + int(token)
            at = int(np.searchsorted(level.keys, key))
            if at == len(level.keys) or level.keys[at] != key:
                return None
        return at

    def _checked(self, ids: Any) -> Ids:
        row = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids, np.int64).reshape(-1)
        if len(row) and not 0 <= row.min() <= row.max() < self.vocab_size:
            raise DataError(
                f"ids from {row.min()} to {row.max()} are outside the vocabulary of "
                f"{self.vocab_size}; does the tokenizer belong to this model?"
            )
        return row


def _count(row: Ids, vocab_size: int, order: int) -> list[_Grams]:
    """The grams of a text, from single tokens up to `order`."""
    if not len(row):
        raise DataError("an n-gram needs tokens to count, and there are none; give it more text")
    grams: list[_Grams] = []
    context, known = np.zeros(len(row), np.int64), np.ones(len(row), bool)
    rows = np.zeros(len(row), np.int64)
    for _ in range(min(order, len(row))):
        key = context[known] * vocab_size + row[known]
        keys, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        shorter = np.zeros(len(keys), np.int64)
        shorter[inverse] = rows[known]
        grams.append(_Grams(keys, counts, shorter))
        rows = np.zeros(len(row), np.int64)
        rows[known] = inverse
        context, known = _shift(rows, 0), _shift(known, False)
    return grams


def _mix(level: _Level, context: Ids, counts: Ids, shorter: Reals) -> Reals:
    """Discounted counts, and the freed mass by the shorter context's distribution."""
    totals = level.totals[context]
    kept = np.maximum(counts - level.discounts[np.minimum(counts, 3)], 0)
    mixed = (kept + level.freed[context] * shorter) / np.maximum(totals, 1)
    # A context that only ends the text is followed by nothing.
    return np.where(totals > 0, mixed, shorter)


def _discounts(counts: Ids) -> Reals:
    """Chen and Goodman's estimates for counts of 1, 2 and more; 0 for none."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if not n.all():
        # Too little text to estimate from.
        return np.array([0.0, 0.5, 0.75, 0.9])
    y = n[0] / (n[0] + 2 * n[1])
    found = [i - (i + 1) * y * n[i] / n[i - 1] for i in (1, 2, 3)]
    return np.array([0.0, *(min(max(d, 0.05), i) for i, d in enumerate(found, 1))])


def _find(keys: Ids, wanted: Ids, known: NDArray[np.bool_]) -> tuple[Ids, NDArray[np.bool_]]:
    """Rows of keys, and whether each is there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, known & (keys[at] == wanted)


def _shift(values: Any, first: Any) -> Any:
    """One place later."""
    return np.concatenate([[first], values[:-1]]).astype(values.dtype)
