"""Evaluation: models at tasks, and two models side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, DataError
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.choices import ChoicesTask
from polyhead.tasks.evaluate.harness import HarnessTask, run_harness, units_of
from polyhead.tasks.evaluate.intervals import paired_interval
from polyhead.tasks.evaluate.keeping import Kept, file_name, identity_of
from polyhead.tasks.evaluate.match import MatchTask
from polyhead.tasks.evaluate.perplexity import PerplexityTask
from polyhead.tasks.evaluate.result import Difference, Result
from polyhead.tasks.evaluate.scorer import MOST_TOKENS
from polyhead.tasks.evaluate.task import LocalTask, Record, Worker
from polyhead.text.tokenizer import Tokenizer

Task = LocalTask | HarnessTask
Progress = Callable[[int, int], None]
"""Called with the samples of a task that are done, and with all."""

KINDS: dict[str, type[LocalTask]] = {
    task.kind: task for task in (PerplexityTask, ChoicesTask, MatchTask)
}


def evaluate(
    model: TaskModel,
    tokenizer: Tokenizer,
    *tasks: Task | str,
    limit: int | None = None,
    most_tokens: int = MOST_TOKENS,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Result]:
    """What a model makes of each task, by the tasks' names.

    tasks: `PerplexityTask`, `ChoicesTask` and `MatchTask` of files, or words such as
    "choices=quiz.jsonl"; other words are tasks of lm-eval, which must be installed. limit: samples
    of each task, the first ones. most_tokens: of a batch. out: a directory for a `.jsonl` of each
    task's samples, where the same call goes on if it was stopped; force: and begins anew.
    Errors: DataError for a file that does not fit its task, ConfigError for a task that does not
    fit the model, FileError for a directory of another evaluation.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    chosen = [task_named(task) for task in tasks]
    check_tasks(chosen)
    worker = Worker(model, tokenizer, most_tokens)
    folder = None if out is None else Path(out)
    found: dict[str, Result] = {}
    for task in chosen:
        if isinstance(task, LocalTask):
            found[task.name] = _local(task, worker, limit, folder, force, progress)
        else:
            found |= run_harness(task, worker, limit, folder, force, progress)
    return found


def task_named(task: Task | str, **settings: Any) -> Task:
    """A task of a word: "choices=quiz.jsonl", or the name of one of lm-eval's.

    settings: fields of the task's. Errors: ConfigError for a kind that is not known.
    """
    if not isinstance(task, str):
        return task
    kind = task_type(task)
    return kind(task.partition("=")[2] or task, **settings)


def task_type(word: str) -> type[LocalTask] | type[HarnessTask]:
    """What a word names: a kind of ours with its file, or a task of lm-eval's."""
    kind, equals, path = word.partition("=")
    if not equals:
        return HarnessTask
    if kind not in KINDS:
        raise ConfigError(f"task {word!r}: {kind!r} is none of {', '.join(KINDS)}; write KIND=FILE")
    if not path:
        raise ConfigError(f"task {word!r} names no file; write {kind}=FILE")
    return KINDS[kind]


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise ConfigError for no task, two under one name, or lm-eval's without lm-eval; FileError
    for a file that is not there."""
    names = [file_name(task.name) for task in tasks]
    if not names:
        raise ConfigError("name at least one task, such as choices=quiz.jsonl")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(f"two tasks are called {name}; name each once, or rename a file")
    for task in tasks:
        task.check()


def compare(
    tasks: Sequence[Task], first: Mapping[str, Result], second: Mapping[str, Result]
) -> list[Difference]:
    """By how much the second model's figures are above the first's, sample by sample.

    Windows of a text are samples of both only where the tokenizers agree; there is no interval
    where they do not, nor for a figure of lm-eval's that is no mean over samples.
    """
    found: list[Difference] = []
    by_name = {task.name: task for task in tasks if isinstance(task, LocalTask)}
    for name in (name for name in first if name in second):
        units = [
            by_name[name].units(one[name].records) if name in by_name else units_of(one[name])
            for one in (first, second)
        ]
        for metric, mine in first[name].metrics.items():
            if metric not in second[name].metrics:
                continue
            interval = None
            a, b = (each.get(metric, []) for each in units)
            if a and [unit.key for unit in a] == [unit.key for unit in b]:
                interval = paired_interval(
                    [(unit.above, unit.below) for unit in a],
                    [(unit.above, unit.below) for unit in b],
                )
            value = second[name][metric].value - mine.value
            found.append(Difference(task=name, metric=metric, value=value, interval=interval))
    return found


def _local(
    task: LocalTask,
    worker: Worker,
    limit: int | None,
    folder: Path | None,
    force: bool,
    progress: Progress | None,
) -> Result:
    samples = task.samples(worker)[:limit]
    if not samples:
        raise DataError(f"{task.path} leaves nothing to ask; give it more rows")
    kept = None
    records: list[Record] = []
    if folder is not None:
        kept = Kept(folder, file_name(task.name), identity_of(task, worker), force)
        records = kept.records[: len(samples)]
    if progress is not None:
        progress(len(records), len(samples))
    for chunk in worker.chunks(samples[len(records) :], lambda sample: sample.size):
        fresh = task.answer(worker, chunk)
        if kept is not None:
            kept.add(fresh)
        records += fresh
        if progress is not None:
            progress(len(records), len(samples))
    return Result(
        task=task.name,
        metrics=task.metrics(records),
        samples=len(records),
        cut=sum(record.get("cut", 0) > 0 for record in records),
        note=task.note(records),
        records=tuple(records),
    )
