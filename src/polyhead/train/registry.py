"""The objectives by name: what each asks of the data and of the model, and what it measures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from polyhead.errors import ConfigError
from polyhead.train.data import Dataset, windows
from polyhead.train.examples import Labels
from polyhead.train.objectives import Loss, causal_lm
from polyhead.train.records import Table
from polyhead.train.supervised import (
    class_figures,
    class_labels,
    classified_texts,
    classify,
    tag,
    tag_figures,
    tag_labels,
    tagged_words,
)

DatasetFactory = Callable[..., Dataset | None]
"""`(source, tokenizer, model, config, split, **options) -> dataset`.

source: texts (`corpus.Source`), or a `records.Table` where the objective has `columns`. split: see
`data.Split`; with "valid", None where the source is too short to hold any out. The digest covers
source, tokenizer and options: a run is resumed only on the same.
"""

Metric = Callable[[Any, Dataset, Sequence[Any]], Mapping[str, float]]
"""`(model, dataset, answers) -> figures` of a validation, the one to judge by first, higher is
better. answers: `Loss.answers` of every batch, in order, on the CPU."""


@dataclass(frozen=True)
class ObjectiveKind:
    """One row.

    head:    what the model needs, as `load(…, head=)` names it; "" where any will do.
    loss:    `(model, batch, **options) -> Loss`.
    labels:  `(table, problem) -> Labels`, what a fresh head is to tell apart, where it has classes.
    columns: the columns it reads of a table, by the name of their role, and whether each must be
             there; empty where the source is plain text.
    options: settings of its own and their defaults; those a factory or a loss names are passed to
             it. `dataset_options` to `dataset`, `loss_options` to `loss`.
    """

    name: str
    help: str
    head: str
    dataset: DatasetFactory
    loss: Callable[..., Loss]
    metric: Metric | None = None
    labels: Callable[[Table, str | None], Labels] | None = None
    columns: Mapping[str, bool] = field(default_factory=dict[str, bool])
    dataset_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss_options: Mapping[str, Any] = field(default_factory=dict[str, Any])


_ROWS = (
    ObjectiveKind("causal-lm", "predict each token from those before it", "lm", windows, causal_lm),
    ObjectiveKind(
        "classify",
        "classes of texts or pairs: one each, several, or a measure",
        "classify",
        classified_texts,
        classify,
        class_figures,
        class_labels,
        columns={"text": True, "label": True, "pair": False},
    ),
    ObjectiveKind(
        "tag",
        "a tag for every word: names, parts of speech",
        "tag",
        tagged_words,
        tag,
        tag_figures,
        tag_labels,
        columns={"tokens": True, "tags": True},
    ),
)

OBJECTIVES: dict[str, ObjectiveKind] = {row.name: row for row in _ROWS}


def objective_named(name: str) -> ObjectiveKind:
    """A row. ConfigError for a name that none has."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


@dataclass(frozen=True)
class Options:
    """Settings of an objective: those that were given, and what its two parts are to be passed."""

    given: Mapping[str, Any]
    dataset: Mapping[str, Any]
    loss: Mapping[str, Any]


def settled(kind: ObjectiveKind, given: Mapping[str, Any]) -> Options:
    """Options with the defaults of what was not given. ConfigError for unknown names and types."""
    known = {**kind.dataset_options, **kind.loss_options}
    for name, value in given.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{kind.name} has no option {name!r}; {has}")
        default = known[name]
        is_number = isinstance(default, float) and type(value) is int
        if default is not None and type(value) is not type(default) and not is_number:
            wanted = type(default).__name__
            raise ConfigError(f"option {name} is {value!r}: it must be of type {wanted}")
    parts = [
        {name: given.get(name, default) for name, default in some.items()}
        for some in (kind.dataset_options, kind.loss_options)
    ]
    return Options(dict(given), *parts)


def sealed(kind: ObjectiveKind, options: Options, digest: str) -> str:
    """What a checkpoint knows its data by: what it is, and what is asked of it."""
    if kind.name == "causal-lm":
        return digest
    said = json.dumps([kind.name, dict(options.dataset), dict(options.loss)], default=str)
    return sha256(f"{said} {digest}".encode()).hexdigest()
