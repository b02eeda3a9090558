"""From rows to what a model is called with: texts encoded, labels numbered."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.models.config import PROBLEMS
from polyhead.train.config import TrainConfig
from polyhead.train.data import Split, split_rows
from polyhead.train.objectives import IGNORE
from polyhead.train.records import Table
from polyhead.train.tokens import tokenizer_digest

SINGLE, SEVERAL, REGRESSION = PROBLEMS
_SHOWN = 8


@dataclass(frozen=True)
class LabelledBatch:
    """inputs: what the model is called with, by name. labels: first dimension B.

    A row counts once, unless `labels` holds a number for every token: then each that is not -100.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def tokens(self) -> int:
        """How much counts."""
        each = self.labels.ndim > 1 and not self.labels.is_floating_point()
        return int((self.labels != IGNORE).sum()) if each else len(self.labels)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device))


@dataclass(frozen=True)
class TextInputs:
    """Texts, or pairs of them, as a model's inputs: cut at `max_len`, padded to the longest."""

    tokenizer: Any
    max_len: int
    with_types: bool

    @classmethod
    def of(cls, tokenizer: Any, model: Any, config: TrainConfig) -> Self:
        """For a model: at most what it takes, and token types where it knows them."""
        # Of two towers, the texts'.
        limit = getattr(getattr(model.config, "text", model.config), "max_tokens", None)
        length = config.context if limit is None else min(config.context, limit)
        takes = inspect.signature(model.backbone.forward).parameters
        return cls(tokenizer, length, "token_type_ids" in takes)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Any:
        """The tokenizer's Batch, with offsets."""
        return self.tokenizer(texts, pairs, max_len=self.max_len, truncate=True)

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        return self.inputs(self.encode(texts, pairs))

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """What the model is called with."""
        found = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.with_types:
            found["token_type_ids"] = batch.token_type_ids
        return found


@dataclass(frozen=True)
class Labels:
    """Names of a column's classes, and which kind of problem they make, where there are kinds."""

    names: tuple[str, ...]
    problem: str | None


def labels_of(values: Iterable[Any], problem: str | None = None) -> Labels:
    """What a label column holds, for a fresh head.

    Lists are several labels a row; numbers of which one is no whole number are a regression;
    anything else is one class a row, whole numbers in their order. `problem` decides otherwise.
    """
    values = list(values)
    _check_known(problem)
    if problem is None:
        if any(isinstance(value, list | tuple) for value in values):
            problem = SEVERAL
        else:
            problem = REGRESSION if _are_measures(values) else SINGLE
    if problem == REGRESSION:
        return Labels(("score",), problem)
    several = problem == SEVERAL
    names = {name for value in values for name in (_several(value) if several else [_name(value)])}
    if len(names) < (1 if several else 2):
        raise DataError(
            f"every row has the label {_listed(names)}: give rows with two or more to tell apart"
        )
    return Labels(tuple(sorted(names, key=_in_order)), problem)


def problem_of(config: Any, values: Sequence[Any]) -> str:
    """The problem of a model: what its config says, or what its labels leave over."""
    if config.problem is not None:
        return config.problem
    if any(isinstance(value, list | tuple) for value in values):
        raise ConfigError(f"rows have several labels each: load the model with problem={SEVERAL!r}")
    return REGRESSION if config.num_labels == 1 else SINGLE


def numbered(values: Sequence[Any], names: Sequence[str], problem: str, where: str) -> Tensor:
    """Labels as a loss wants them: classes [N], or float [N, C] of measures or of 0 and 1."""
    if problem == REGRESSION:
        rows = [value if isinstance(value, list | tuple) else [value] for value in values]
        found = [[_measure(one, where, n) for one in row] for n, row in enumerate(rows)]
        if wrong := [n for n, row in enumerate(found) if len(row) != len(names)]:
            raise DataError(
                f"{where}: row {wrong[0]} has {len(found[wrong[0]])} numbers, and the model "
                f"answers with {len(names)}"
            )
        return torch.tensor(found, dtype=torch.float32)
    numbers = {name: number for number, name in enumerate(names)}
    if problem == SINGLE:
        named = [_name(value) for value in values]
        _check_names(set(named), numbers, where)
        return torch.tensor([numbers[name] for name in named])
    many = [_several(value) for value in values]
    _check_names({name for row in many for name in row}, numbers, where)
    answers = torch.zeros(len(many), len(names))
    for at, row in enumerate(many):
        answers[at, [numbers[name] for name in row]] = 1.0
    return answers


def part_of(table: Table, config: TrainConfig, split: Split) -> Table | None:
    """The rows of one side of a table; None where none is held out."""
    if split == "all" or (split == "train" and not config.held_out):
        return table
    rows = split_rows(len(table), config.held_out, config.seed, split)
    return table.take(rows.tolist()) if len(rows) else None


def lengths_of(columns: Iterable[Sequence[Any]], split: Split) -> np.ndarray | None:
    """How long each row is by the length of its texts or words; None for what is only validated on,
    where each row comes once whatever the batches."""
    if split != "train":
        return None
    return np.sum([[len(value) for value in column] for column in columns], axis=0)


def digest_of(table: Table, tokenizer: Any, *settings: Any) -> str:
    """What tells a dataset from others: its table, its tokenizer and what was asked of them."""
    known = tokenizer_digest(tokenizer) if hasattr(tokenizer, "backend") else repr(tokenizer)
    return f"{table.digest} {known} {settings}"


def strings(values: Sequence[Any], role: str, where: str) -> None:
    """DataError unless every value of a column is text."""
    for row, value in enumerate(values):
        if not isinstance(value, str):
            kind = "missing" if value is None else f"a {type(value).__name__}"
            raise DataError(f"{where}: {role} of row {row} is {kind}: it must be text")


def _check_known(problem: str | None) -> None:
    if problem is not None and problem not in PROBLEMS:
        raise ConfigError(f"problem is {problem!r}: choose one of {', '.join(PROBLEMS)}")


def _check_names(found: set[str], known: Mapping[str, int], where: str) -> None:
    if unknown := sorted(found - known.keys()):
        raise DataError(
            f"{where} has the label {_listed(unknown)}, which the model was not made for: it knows "
            f"{_listed(known)}"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = " …" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _are_measures(values: Sequence[Any]) -> bool:
    """Whether all are numbers, some of them with a fraction or written as one."""
    if all(isinstance(value, str) for value in values):
        # What is nan among fractions is a measure that is missing, and is refused as one.
        rest = [value for value in values if value.strip().lower() != "nan"]
        found = [_number(value) for value in rest]
        return None not in found and not all(_is_whole(value) for value in rest)
    return all(type(v) in (int, float) for v in values) and any(type(v) is float for v in values)


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _measure(value: Any, where: str, row: int) -> float:
    number = None if isinstance(value, bool) else _number(value)
    if number is None:
        raise DataError(f"{where}: the label of row {row} is {value!r}, not a number")
    return number


def _name(value: Any) -> str:
    if value is None or value == "" or isinstance(value, list | tuple | dict):
        raise DataError(f"a label is {value!r}: each row needs one class, a word or a number")
    return str(value)


def _several(value: Any) -> list[str]:
    """A list of labels, or words between commas; none at all is an answer, too."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise DataError(f"labels are {value!r}: give a list, or names between commas")
    return [_name(one) for one in value]


def _in_order(name: str) -> tuple[bool, float, str]:
    number = _number(name)
    return number is None, number or 0.0, name


def as_numpy(rows: Sequence[Tensor]) -> np.ndarray:
    """Batches one after the other."""
    return torch.cat(list(rows)).float().numpy()
