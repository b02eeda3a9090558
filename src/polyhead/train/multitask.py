"""Several heads on one backbone, trained together: each batch is of one task."""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.files.toml import read_toml
from polyhead.models.fits import fits
from polyhead.train.config import TrainConfig
from polyhead.train.data import Mixed, Split, TaskBatch
from polyhead.train.objectives import Loss
from polyhead.train.records import ExampleColumns, Rows, Table, read_table

# What a task of a file may say, and how.
_KNOWN: Mapping[str, Any] = {
    **dict.fromkeys(("data", "head", "problem"), str),
    "roles": Mapping[str, str],
    "columns": tuple[str, ...],
}


@dataclass(frozen=True)
class TaskSource:
    """One task's table, and the head that learns it: "classify", "tag" or "answer"."""

    data: Rows
    head: str
    columns: ExampleColumns = ExampleColumns({})  # noqa: RUF009 (frozen)
    problem: str | None = None


class OneTask:
    """A model of several heads as a model of one of them: what an objective sees of it."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name, self.backbone = model, name, model.backbone
        task = model.config.tasks[name]
        labels = task.get("labels")
        names = None if labels is None else tuple(labels)
        self.config = replace(model.config, labels=names, problem=task.get("problem"), tasks=None)

    @property
    def training(self) -> bool:
        """Whether the model is."""
        return self.model.training

    @property
    def head(self) -> Any:
        """The task's."""
        return self.model.head.pick(self.name)

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs, head=self.name)

    def answer(self, hidden: Tensor, attention_mask: Any = None) -> Tensor:
        """The task's head's answer."""
        return self.model.answer(hidden, attention_mask, self.name)


def read_tasks(path: str | Path) -> dict[str, TaskSource]:
    """Tasks of a TOML file: a table [name] each, with data (from the file's folder), head, and
    where they are needed problem, roles = {role = "column"} and columns = ["name", …]."""
    place = Path(path)
    found = read_toml(place)
    tasks: dict[str, TaskSource] = {}
    for name, task in found.items():
        if not isinstance(task, dict) or not {"data", "head"} <= task.keys() <= _KNOWN.keys():
            raise ConfigError(
                f"{path}: task {name!r} has data and head, and may have problem, roles, columns"
            )
        if wrong := [key for key, value in task.items() if not fits(value, _KNOWN[key])]:
            raise ConfigError(
                f"{path}: {wrong[0]} of task {name!r} is {task[wrong[0]]!r}: data, head and "
                "problem are words, roles a table of words, and columns a list of them"
            )
        columns = ExampleColumns(task.get("roles", {}), tuple(task.get("columns", ())))
        data = place.parent / task["data"]
        tasks[name] = TaskSource(data, task["head"], columns, task.get("problem"))
    if not tasks:
        raise ConfigError(f"{path} names no tasks: give each a table, such as [topic]")
    return tasks


def tables_of(sources: Mapping[str, TaskSource], kinds: Mapping[str, Any]) -> dict[str, Table]:
    """The table of each task. kinds: the objective of each head."""
    tables: dict[str, Table] = {}
    for name, source in sources.items():
        if source.head not in kinds:
            raise ConfigError(
                f"task {name!r} asks for head {source.head!r}: choose one of {', '.join(kinds)}"
            )
        is_read = isinstance(source.data, Table)
        columns = kinds[source.head].columns
        tables[name] = source.data if is_read else read_table(source.data, columns, source.columns)
    return tables


def opened(sources: Mapping[str, TaskSource], kinds: Mapping[str, Any]) -> dict[str, TaskSource]:
    """The same with every table read, so that it is read once."""
    tables = tables_of(sources, kinds)
    return {name: replace(source, data=tables[name]) for name, source in sources.items()}


def decided_tasks(
    kinds: Mapping[str, Any], model: Any, tokenizer: Any, sources: Mapping[str, TaskSource]
) -> None:
    """Name the problem of each task that has one."""
    tasks = dict(model.config.tasks or {})
    for name, table in tables_of(sources, kinds).items():
        kind = kinds[sources[name].head]
        if kind.decide is not None and name in tasks:
            one = OneTask(model, name)
            kind.decide(one, tokenizer, table)
            tasks[name] = {**tasks[name], "problem": one.config.problem}
    model.config = replace(model.config, tasks=tasks)


def tasks_of(sources: Mapping[str, TaskSource], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """What `load(…, head="multitask", tasks=)` takes: each task's head, labels and problem."""
    tasks: dict[str, Any] = {}
    for name, table in tables_of(sources, kinds).items():
        kind = kinds[sources[name].head]
        tasks[name] = {"head": kind.head}
        if kind.labels is not None:
            labels = kind.labels(table, sources[name].problem)
            tasks[name]["labels"] = list(labels.names)
            tasks[name]["problem"] = labels.problem
    return tasks


def mixed_tasks(
    kinds: Mapping[str, Any],
    sources: Mapping[str, TaskSource],
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
) -> Mixed | None:
    """The datasets of all tasks; with "valid", of those that hold rows out."""
    if not isinstance(sources, Mapping) or sources.keys() != (model.config.tasks or {}).keys():
        raise ConfigError(
            f"the model has the tasks {', '.join(model.config.tasks or ())}: give each its "
            "TaskSource, by its name"
        )
    parts: dict[str, Any] = {}
    for name, table in tables_of(sources, kinds).items():
        kind, one = kinds[sources[name].head], OneTask(model, name)
        part = kind.dataset(table, tokenizer, one, config, split, **kind.dataset_options)
        if part is not None:
            parts[name] = part
    seal = hashlib.sha256(str([(name, part.digest) for name, part in parts.items()]).encode())
    return Mixed(parts, config.seed, seal.hexdigest()) if parts else None


def multitask(kinds: Mapping[str, Any], model: Any, batch: TaskBatch) -> Loss:
    """The loss of the batch's task, a mean over what it counts times its rows."""
    tasks = model.config.tasks
    kind = kinds[tasks[batch.task]["head"]]
    loss = kind.loss(OneTask(model, batch.task), batch.batch, **kind.loss_options)
    share = batch.rows / max(1, loss.tokens)
    number = torch.tensor(list(tasks).index(batch.task))
    parts = {"loss": loss.parts["loss"] * share}
    answers = (number, *loss.answers)
    return Loss(loss.total * share, batch.tokens(), parts, answers, loss.logits)


def task_figures(
    kinds: Mapping[str, Any], model: Any, dataset: Mixed, answers: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """The mean of every task's first figure, and all figures as TASK_FIGURE."""
    figures: dict[str, float] = {}
    firsts: list[float] = []
    for number, (name, task) in enumerate(model.config.tasks.items()):
        own = [some for at, *some in answers if int(at) == number]
        if not own:
            continue
        kind = kinds[task["head"]]
        found = kind.metric(OneTask(model, name), dataset.parts[name], own)
        firsts.append(next(iter(found.values())))
        figures |= {f"{name}_{figure}": value for figure, value in found.items()}
    return {"mean": statistics.fmean(firsts), **figures}
