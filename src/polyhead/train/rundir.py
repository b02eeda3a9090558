"""A run's directory: taken for a new run or an old one, and told what the run is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import FileError
from polyhead.train.teacher import KEPT, SAID


def claim(run: Path, *, resume: bool, force: bool) -> None:
    """Make the run directory; FileError where a run already is, unless told what to do.

    What a start that failed left behind is no run: it has neither checkpoint nor log line.
    """
    log = run / "log.jsonl"
    begun = any((run / "checkpoints").glob("[!.]*")) or (log.exists() and log.stat().st_size > 0)
    if begun and not (resume or force):
        raise FileError(f"{run} already holds a run: resume it, or use force or another out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the run directory {run}: {error.strerror}") from None


def begin(run: Path, about: Mapping[str, Any], *, anew: bool) -> None:
    """Remove what was there, if `anew`, and make what a run needs where it is missing.

    about: what run.json is to say, unless it is there.
    """
    folder, said = run / "checkpoints", run / "run.json"
    try:
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
            for name in ("log.jsonl", "config.toml", "run.json", KEPT, SAID):
                (run / name).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        if about and not said.exists():
            said.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot begin in {run}: {error.strerror}") from None
