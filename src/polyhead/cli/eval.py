"""`polyhead eval`: how well a model does at tasks, or one model beside another."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.common import note
from polyhead.cli.texts import print_table, progress
from polyhead.errors import ConfigError, FileError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.tasks.evaluate.result import Difference, Metric, Result
    from polyhead.tasks.evaluate.run import Task

_MOST_TOKENS = 8192  # as the library has it, which would import torch


@dataclass(frozen=True)
class Args:
    """Evaluate a model at tasks over your own files, or at those of lm-eval.

    Every figure has a 95 % interval. With two models the second's figures stand beside the first's,
    and the interval of their difference is of the samples drawn in pairs. With --out a run that was
    stopped goes on where it stopped.

    Tasks:
      perplexity=FILE  of a text, or of the column "text" of a .jsonl, .tsv or .csv file
      choices=FILE     rows with question, choices (a list) and answer (its place from 0, or text)
      match=FILE       rows with question and answer (a text, or a list of which any counts)
      NAME             a task, group or tag of lm-eval (pip install 'polyhead[eval]')

    Examples:
      polyhead eval smollm2-135m --tasks perplexity=book.txt choices=quiz.jsonl --out runs/eval
      polyhead eval runs/docs --tasks match=sums.jsonl --shots 4 --stop "\\n" --extract "[0-9]+"
      polyhead eval runs/a runs/b --tasks choices=quiz.jsonl --prompt "Q: {question}\\nA:" --json
      polyhead eval runs/docs --tasks choices=quiz.jsonl --columns question=ctx answer=label
      polyhead eval smollm2-135m --tasks hellaswag,arc_easy --limit 200
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL]")]
    """One model or two: directory, .gguf file, training run, name or owner/name of the hub."""
    tasks: tuple[str, ...] = ()
    """What to do: KIND=FILE, or tasks of lm-eval."""
    limit: int | None = None
    """Only the first samples of each task."""
    shots: int | None = None
    """Solved examples before each question: the first rows of the file, which are not asked."""
    prompt: str | None = None
    """What a question looks like, a row's columns in braces, \\n for a new line; {question} if not
    said."""
    before: str | None = None
    """What stands between a prompt and its answer; a space if not said."""
    chat: bool = False
    """Put prompts into the model's chat template."""
    columns: tuple[str, ...] = ()
    """The file's own names of columns, such as question=ctx answer=label."""
    max_new_tokens: int | None = None
    """match: tokens of an answer; 64 if not said."""
    stop: tuple[str, ...] | None = None
    """match: strings that end an answer; an empty line if not said."""
    extract: str | None = None
    """match: a regular expression whose last match, or first group of it, is the answer."""
    ignore: tuple[str, ...] | None = None
    """match: what may differ: case, punctuation, articles, numbers."""
    context: int | None = None
    """perplexity: tokens of a window; None is the model's own length, at most 2048."""
    stride: int | None = None
    """perplexity: how far windows advance; None is half."""
    include_path: str | None = None
    """lm-eval: a directory with YAML tasks of your own."""
    batch_tokens: int = _MOST_TOKENS
    """Tokens of a batch, padding included; fewer need less memory."""
    out: str | None = None
    """A directory for every sample's record and for the results."""
    force: bool = False
    """Begin anew where --out holds another evaluation."""
    json: bool = False
    """One JSON object: models, each with its tasks' metrics; differences."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Evaluate and print."""
    if not 1 <= len(args.models) <= 2:
        raise ConfigError(f"{len(args.models)} models; name one, or two to compare")
    words = [name for word in args.tasks for name in _names(word)]
    if not words:
        raise ConfigError("there is no task; say --tasks, such as choices=quiz.jsonl")
    from polyhead.tasks.evaluate.run import check_tasks, compare

    tasks = _tasks(args, words)
    check_tasks(tasks)
    found: list[dict[str, Result]] = [{} for _ in args.models]
    folders = _folders(args)
    try:
        for place, name in enumerate(args.models):
            _evaluate(args, name, tasks, folders[place], found[place])
    except KeyboardInterrupt:
        kept = "" if args.out is None else f"; {args.out} keeps every sample: run it again to go on"
        note(f"stopped; what follows is of the tasks that are done{kept}")
        _print(args, found, [])
        raise
    differences = compare(tasks, found[0], found[1]) if len(found) == 2 else []
    if args.out is not None:
        said = json.dumps(_record(args, found, differences), indent=2)
        Path(args.out, "results.json").write_text(f"{said}\n", encoding="utf-8")
    _print(args, found, differences)
    return 0


def _names(word: str) -> list[str]:
    """The tasks of a word: a file's name may hold commas, a list of lm-eval's tasks does."""
    return [word] if "=" in word else [name for name in word.split(",") if name]


def _tasks(args: Args, words: Sequence[str]) -> "list[Task]":
    """Each task with the settings of the command line that it has."""
    from polyhead.tasks.evaluate.run import task_named, task_type

    given: dict[str, Any] = {
        name: value
        for name in ("shots", "prompt", "before", "max_new_tokens", "stop", "extract", "ignore",
                     "context", "stride", "include_path")
        if (value := getattr(args, name)) is not None
    }  # fmt: skip
    for name in ("prompt", "before"):
        if name in given:
            given[name] = _unescaped(given[name])
    if "stop" in given:
        given["stop"] = tuple(map(_unescaped, given["stop"]))
    if args.chat:
        given["chat"] = True
    columns = _columns(args.columns)
    types = [task_type(word) for word in words]
    used: set[str] = set()
    tasks: list[Task] = []
    for word, kind in zip(words, types, strict=True):
        has = {item.name for item in fields(kind)}
        mine = {name: value for name, value in given.items() if name in has}
        if "columns" in has:
            mine["columns"] = {n: theirs for n, theirs in columns.items() if n in kind.reads}
            used.update(mine["columns"])
        used.update(mine)
        tasks.append(task_named(word, **mine))
    for name in [*given, *columns]:
        if name not in used:
            flag = f"--columns {name}" if name in columns else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is not for {', '.join(words)}; leave it out")
    return tasks


def _columns(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, _, theirs = word.partition("=")
        if not name or not theirs:
            raise ConfigError(f"--columns {word!r}: write NAME=THE_FILE'S, such as answer=label")
        found[name] = theirs
    return found


def _unescaped(text: str) -> str:
    """A text of the command line, where a new line and a tab are hard to write."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _folders(args: Args) -> list[Path | None]:
    """Where each model's samples are kept."""
    if args.out is None:
        return [None] * len(args.models)
    if Path(args.out).is_file():
        raise FileError(f"{args.out} is a file; name a directory to write to")
    names = [re.sub(r"[^\w.-]", "_", Path(name).name) or "model" for name in args.models]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, 1)]
    return [Path(args.out, name) for name in names]


def _evaluate(
    args: Args,
    name: str,
    tasks: "Sequence[Task]",
    folder: Path | None,
    found: "dict[str, Result]",
) -> None:
    """A model's results, added as they come."""
    from polyhead.tasks.evaluate.run import evaluate

    model, tokenizer = args.opening.open(name)
    for task in tasks:
        with progress(f"{task.name} of {name}") as tell:
            found |= evaluate(
                model,
                tokenizer,
                task,
                limit=args.limit,
                most_tokens=args.batch_tokens,
                out=folder,
                force=args.force,
                progress=tell,
            )
    for one in found.values():
        if one.cut:
            note(
                f"{one.task}: of {one.cut} of {one.samples} prompts the beginning was not read: "
                f"the model takes {model.config.max_tokens} tokens"
            )


def _print(
    args: Args, found: "Sequence[Mapping[str, Result]]", differences: "Sequence[Difference]"
) -> None:
    if args.json:
        print(json.dumps(_record(args, found, differences)))
    elif differences:
        rows = [
            (
                one.task,
                one.metric,
                found[0][one.task][one.metric].value,
                found[1][one.task][one.metric].value,
                one.value,
                _shown(one.interval),
                found[0][one.task].samples,
            )
            for one in differences
        ]
        print_table(
            ("task", "metric", "first", "second", "difference", "95 % interval", "samples"), rows
        )
    else:
        rows = [
            (result.task, name, metric.value, _shown(metric.interval), result.samples, result.note)
            for results in found
            for result in results.values()
            for name, metric in result.metrics.items()
        ]
        print_table(("task", "metric", "value", "95 % interval", "samples", "of"), rows)


def _shown(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _record(
    args: Args, found: "Sequence[Mapping[str, Result]]", differences: "Sequence[Difference]"
) -> dict[str, Any]:
    """What --json says, and results.json."""
    return {
        "models": [
            {
                "model": name,
                "tasks": {
                    result.task: {
                        "metrics": {key: _plain(value) for key, value in result.metrics.items()},
                        "samples": result.samples,
                        "cut": result.cut,
                    }
                    for result in results.values()
                },
            }
            for name, results in zip(args.models, found, strict=True)
        ],
        "differences": [
            {"task": one.task, "metric": one.metric, **_plain(one)} for one in differences
        ],
    }


def _plain(value: "Metric | Difference") -> dict[str, Any]:
    low, high = value.interval or (None, None)
    return {"value": value.value, "low": low, "high": high}
