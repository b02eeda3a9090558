"""Tasks of EleutherAI's lm-evaluation-harness, run by the package itself over our models."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.tasks.evaluate.intervals import wilson
from polyhead.tasks.evaluate.keeping import Kept, file_name, fingerprints
from polyhead.tasks.evaluate.result import Metric, Result
from polyhead.tasks.evaluate.task import Unit, Worker

_Z = 1.959964  # standard errors of a 95 % interval


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag of lm-eval's. include_path: a directory with YAML tasks of one's own.

    shots: examples before each question; None: as many as the task says. chat: prompts go into the
    tokenizer's chat template.
    """

    name: str
    include_path: str | None = None
    shots: int | None = None
    chat: bool = False

    def check(self) -> None:
        """Raise ConfigError where lm-eval is not installed, FileError for a directory not there."""
        if find_spec("lm_eval") is None:
            raise ConfigError(
                f"{self.name!r} is a task of lm-eval, which is not installed (pip install "
                "'polyhead[eval]'); for a file write perplexity=, choices= or match= before it"
            )
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise FileError(f"{self.include_path} is no directory; name one with YAML tasks")


def run_harness(
    task: HarnessTask,
    worker: Worker,
    limit: int | None = None,
    folder: Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Result]:
    """A result for each task that the name stands for, and for the groups over them.

    Intervals are Wilson's of what is right or wrong, else 1.96 of lm-eval's standard errors.
    folder: for each task's samples, and for the model's answers so far, from which a stopped run
    goes on. Errors: ConfigError where lm-eval is not installed, DataError for a task that it does
    not know or has no data of.
    """
    from lm_eval import simple_evaluate

    from polyhead.tasks.lm_eval import PolyheadLM

    lm = PolyheadLM(
        worker.model, worker.tokenizer, most_tokens=worker.most_tokens, progress=progress
    )
    cache = None
    if folder is not None:
        identity = {**asdict(task), **fingerprints(worker.model, worker.tokenizer)}
        kept = Kept(folder, f"{file_name(task.name)}.lm-eval", identity, force)
        cache = str(kept.path.with_suffix(""))
        if force:
            Path(f"{cache}_rank0.db").unlink(missing_ok=True)
    try:
        # What it logs of tasks that say less than they could is for their authors.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        said: Any = simple_evaluate(
            lm, tasks=[task.name], num_fewshot=task.shots, limit=limit, use_cache=cache,
            apply_chat_template=task.chat, task_manager=_manager(task), bootstrap_iters=1000,
        )  # fmt: skip
    except PolyheadError:
        raise
    except Exception as error:  # whatever the package, its data sets and their hub may raise
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"lm-eval cannot run {task.name!r}: {line}") from error
    found = {
        name: _result(name, figures, said)
        for name, figures in {**said["results"], **said.get("groups", {})}.items()
    }
    if folder is not None:
        for name, rows in said.get("samples", {}).items():
            lines = "".join(f"{json.dumps(row, default=str, ensure_ascii=False)}\n" for row in rows)
            (folder / f"{file_name(name)}.jsonl").write_text(lines, encoding="utf-8")
    return found


def _manager(task: HarnessTask) -> Any:
    """What finds a task: one's own directory alone where it is there, for lm-eval's own thousands
    of files take seconds to look through."""
    from lm_eval.tasks import TaskManager

    if task.include_path is None:
        return _defaults()
    own = TaskManager(include_path=task.include_path, include_defaults=False)
    return own if task.name in own.all_subtasks else TaskManager(include_path=task.include_path)


@cache
def _defaults() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def units_of(result: Result) -> dict[str, list[Unit]]:
    """The samples of each metric that is a mean over them, to be paired with another model's."""
    found: dict[str, list[Unit]] = {}
    for shown, metric in result.metrics.items():
        name, _, chosen = shown.partition(" (")
        values = _values(result.records, name, chosen.removesuffix(")") or "none")
        if values and math.isclose(sum(values.values()) / len(values), metric.value, abs_tol=1e-9):
            found[shown] = [Unit(key, value, 1) for key, value in values.items()]
    return found


def _result(name: str, figures: Mapping[str, Any], said: Mapping[str, Any]) -> Result:
    rows = tuple(said.get("samples", {}).get(name, ()))
    metrics: dict[str, Metric] = {}
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{chosen}")
        values = _values(rows, metric, chosen).values()
        interval = None
        if values and set(values) <= {0, 1}:
            interval = wilson(round(sum(values)), len(values))
        elif isinstance(error, int | float) and math.isfinite(error):
            interval = (value - _Z * error, value + _Z * error)
        shown = metric if chosen == "none" else f"{metric} ({chosen})"
        metrics[shown] = Metric(float(value), interval)
    counted = said.get("n-samples", {}).get(name, {}).get("effective", 0)
    return Result(task=name, metrics=metrics, samples=counted or len(rows), records=rows)


def _values(rows: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> dict[Any, float]:
    """A metric of each sample, by its number, where it has one; chosen: lm-eval's filter."""
    return {
        row["doc_id"]: float(row[metric])
        for row in rows
        if row.get("filter", "none") == chosen and isinstance(row.get(metric), int | float)
    }
