"""The objectives by name: what each asks of the data and of the model, and what it measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyhead.errors import ConfigError
from polyhead.train.data import Dataset, windows
from polyhead.train.objectives import Loss, causal_lm

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
    columns: Mapping[str, bool] = field(default_factory=dict[str, bool])
    dataset_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss_options: Mapping[str, Any] = field(default_factory=dict[str, Any])


_ROWS = (
    ObjectiveKind("causal-lm", "predict each token from those before it", "lm", windows, causal_lm),
)

OBJECTIVES: dict[str, ObjectiveKind] = {row.name: row for row in _ROWS}


def objective_named(name: str) -> ObjectiveKind:
    """A row. ConfigError for a name that none has."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
