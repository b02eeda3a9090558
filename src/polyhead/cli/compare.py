"""`polyhead compare`: several training runs beside each other, as a table and a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from polyhead.errors import ConfigError, FileError

_SPEEDS = ("tokens_per_second", "rows_per_second")


@dataclass(frozen=True)
class Args:
    """Compare training runs: the settings in which they differ, and what came of them.

    Examples:
      polyhead compare runs/a runs/b runs/c
      polyhead compare runs/* --out compare.html
      polyhead compare runs/a runs/b --json
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """Run directories of `polyhead train`."""
    out: Path | None = None
    """Also write a page with the curves: loss, held-out loss, gradients, learning rate, speed."""
    force: bool = False
    """Write over a page that is there."""
    json: bool = False
    """One JSON object a run and line."""


def run(args: Args) -> int:
    """Read, print, and write the page."""
    if not args.runs:
        raise ConfigError("name one run directory or more, such as runs/a runs/b")
    if args.out is not None and args.out.exists() and not args.force:
        raise FileError(f"{args.out} is there already; use --force, or another name")
    names = _named(args.runs)
    logs = {name: _log_of(path) for name, path in names.items()}
    found = {name: summary(path, logs[name]) for name, path in names.items()}
    if args.json:
        for name, values in found.items():
            print(json.dumps({"run": name, **values}))
    else:
        _print(found)
    if args.out is not None:
        _write(args.out, names, logs, found)
        print(args.out)
    return 0


def _log_of(path: Path) -> list[dict[str, Any]]:
    from polyhead.train.log import read_log

    if not (path / "log.jsonl").exists():
        raise FileError(f"{path} is no training run: it has no log.jsonl")
    return read_log(path / "log.jsonl")


def summary(path: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run was told and what its log came to: settings, the last figures, and the best."""
    from polyhead.train.config import TrainConfig

    settings = TrainConfig.load(path / "config.toml").to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("out", "cache")}
    last: dict[str, Any] = {}
    for record in records:
        last |= {key: value for key, value in record.items() if key != "sample"}
    valid = [record["valid_loss"] for record in records if "valid_loss" in record]
    speeds = [record[name] for record in records for name in _SPEEDS if name in record]
    return {
        "settings": settings,
        "steps": last.get("step", 0),
        "loss": last.get("loss"),
        "valid_loss": last.get("valid_loss"),
        "best_valid_loss": min(valid, default=None),
        "speed": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "unit": next((n.partition("_")[0] for n in _SPEEDS if n in last), None),
        "memory_bytes": max((r["memory_bytes"] for r in records if "memory_bytes" in r), default=0),
        "seconds": sum(record.get("seconds", 0.0) for record in records),
        "skipped": sum("skipped" in record for record in records),
        "rewound": sum("rewound_to" in record for record in records),
    }


def _named(paths: tuple[Path, ...]) -> dict[str, Path]:
    """Short names, and whole paths where those are the same."""
    short = [path.resolve().name for path in paths]
    return {
        str(path) if short.count(name) > 1 else name: path
        for path, name in zip(paths, short, strict=True)
    }


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """The settings that are not the same in all runs."""
    settings = [values["settings"] for values in found.values()]
    names = sorted({name for one in settings for name in one})
    return [name for name in names if len({str(one.get(name)) for one in settings}) > 1]


def _rows(found: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Lines of the table: what, and each run's value."""
    runs = list(found.values())
    units = sorted({one["unit"] for one in runs if one["unit"]})
    values: dict[str, list[Any]] = {
        name: [one["settings"].get(name) for one in runs] for name in differences(found)
    }
    values |= {
        name.replace("_", " "): [one[name] for one in runs]
        for name in ("steps", "loss", "valid_loss", "best_valid_loss")
    }
    values[f"{' or '.join(units) or 'rows'} a second"] = [one["speed"] for one in runs]
    values["peak memory, MiB"] = [one["memory_bytes"] / 2**20 for one in runs]
    values["minutes"] = [one["seconds"] / 60 for one in runs]
    values |= {
        f"steps {name}": [one[name] for one in runs]
        for name in ("skipped", "rewound")
        if any(one[name] for one in runs)
    }
    return [(name, [_said(value) for value in some]) for name, some in values.items()]


def _said(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(found: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right", overflow="fold")
    for name, values in _rows(found):
        table.add_row(name, *values)
    Console(soft_wrap=True).print(table)


def _write(
    out: Path,
    names: dict[str, Path],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    found: dict[str, dict[str, Any]],
) -> None:
    from polyhead.cli.reporting import charts_of, samples_of
    from polyhead.train.log import standing
    from polyhead.train.report import Chart, Report, write_report

    losses = [
        Chart(title, {
            name: [(r["step"], r[key]) for r in standing(records) if key in r]
            for name, records in logs.items()
        }, "In nats, by step; lower is better.")
        for title, key in (("Training loss", "loss"), ("Held-out loss", "valid_loss"))
    ]  # fmt: skip
    samples = [
        (f"{name}, step {step}", text)
        for name, path in names.items()
        for step, text in samples_of(path)[-1:]
    ]
    table = [["", *found], *([name, *values] for name, values in _rows(found))]
    title = f"{len(names)} runs" if len(names) > 1 else next(iter(names))
    write_report(
        out, Report(title, charts=[*losses, *charts_of(logs)], table=table, samples=samples)
    )
