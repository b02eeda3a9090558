"""Whether a model has the head that a task asks, and what to do where it has not."""

from dataclasses import dataclass

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.head import Heads

# What each head is trained by, and how a sentence says what it does.
_TRAINED = {
    "classify": ("classify", "classifies"),
    "tag": ("tag", "tags words"),
    "answer": ("answer", "answers questions"),
    "lm": ("masked-lm", "fills masks"),
}


@dataclass(frozen=True)
class Fit:
    """The head that a task reads. name: for `model(..., head=name)`, None where it has only one.

    labels: of its classes. problem: as in `Config`.
    """

    name: str | None
    labels: tuple[str, ...]
    problem: str | None


def fit(model: TaskModel, wanted: str, name: str | None = None) -> Fit:
    """The head of a kind ("classify", "tag", "answer", "lm"); of several, the one of a name.

    Errors: ConfigError for a model without such a head, saying how to get one.
    """
    config = model.config
    if model.head_kind == wanted and name is None:
        return Fit(None, _labels(config.labels, config.num_labels), config.problem)
    if not isinstance(model.head, Heads):
        if name is not None:
            raise ConfigError(f"there is one head and none called {name!r}; leave the name out")
        raise ConfigError(_misfit(model, wanted))
    kinds = {own: own for own in model.head}
    if config.tasks is not None:
        kinds = {own: task["head"] for own, task in config.tasks.items()}
    fitting = [own for own, kind in kinds.items() if kind == wanted]
    if not fitting:
        raise ConfigError(_misfit(model, wanted))
    if name is None and len(fitting) > 1:
        raise ConfigError(f"the model has the heads {', '.join(fitting)}; name one with head=")
    if name is not None and name not in fitting:
        raise ConfigError(f"there is no such head {name!r}; there are {', '.join(fitting)}")
    chosen = fitting[0] if name is None else name
    task = (config.tasks or {}).get(chosen, {})
    labels = task.get("labels")
    found = tuple(labels) if labels else None
    return Fit(chosen, _labels(found, 2 if found is None else len(found)), task.get("problem"))


def kind_of(model: TaskModel) -> str:
    """What a model reads and writes: "encoder", "decoder", "vision", "two towers" and others."""
    return getattr(model.config, "kind", "decoder")


def _labels(labels: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count)) if labels is None else labels


def _misfit(model: TaskModel, wanted: str) -> str:
    objective, does = _TRAINED[wanted]
    row = model.config.row(model.config.model_type)
    there = row.architecture(model.head_kind)
    if wanted not in row.heads:
        return (
            f"{there} is no model that {does}, and {row.model_type} can carry no such head (only "
            f"{', '.join(row.heads) or 'none'}); choose another model, such as a bert"
        )
    has = "no head" if model.head is None else f"the head {model.head_kind!r}"
    return (
        f"{there} has {has}, not one that {does}; train one with "
        f"polyhead train DATA --objective {objective} --model CHECKPOINT, or name a model that has "
        f"it (an architecture {row.architecture(wanted)})"
    )
