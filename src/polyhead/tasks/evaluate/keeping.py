"""What is known of samples already, on disk, so that a run that was stopped goes on."""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file
from polyhead.files.jsons import read_json
from polyhead.tasks.evaluate.task import LocalTask, Record, Worker

_PER_TENSOR = 64  # numbers that stand for it


class Kept:
    """A task's records in `NAME.jsonl`, a line each, and what they are of in `NAME.json`.

    A line is on disk as soon as its sample is done. `records`: those of an earlier run.
    Errors: FileError where the files are of another model, task or text, unless `force`.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], force: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, about = folder / f"{name}.jsonl", folder / f"{name}.json"
        identity = json.loads(json.dumps(identity))
        if about.exists() and not force:
            before = read_json(about)
            if before != identity:
                other = [key for key in identity if identity[key] != before.get(key)]
                raise FileError(
                    f"{self.lines} is of another evaluation ({', '.join(other) or 'older'}); "
                    "choose another place, or use force"
                )
        elif not force and self.lines.exists():
            raise FileError(f"{self.lines} is in the way; choose another place, or use force")
        else:
            self.lines.unlink(missing_ok=True)
            with atomic_file(about) as file:
                file.write(f"{json.dumps(identity, indent=2)}\n".encode())
        self.records = self._read()

    def add(self, records: Sequence[Record]) -> None:
        """Write some more, and see them on disk."""
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        with self.lines.open("ab") as file:
            file.write(lines.encode())

    def _read(self) -> list[Record]:
        """The lines that are whole; what a kill left behind of another is cut off."""
        if not self.lines.exists():
            return []
        raw = self.lines.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.lines.open("r+b") as file:
                file.truncate(whole)
        try:
            return [json.loads(line) for line in raw[:whole].splitlines()]
        except ValueError:
            raise FileError(
                f"{self.lines} holds lines that are no JSON; delete it, or use force"
            ) from None


def file_name(task: str) -> str:
    """What a task's files are called: `choices.quiz` of `choices=data/quiz.jsonl`."""
    kind, equals, path = task.partition("=")
    name = f"{kind}.{Path(path).stem}" if equals else kind
    return re.sub(r"[^\w.-]", "_", name)


def identity_of(task: LocalTask, worker: Worker) -> dict[str, Any]:
    """What tells a task, its file's contents and who works at it from others."""
    return {
        "task": task.kind,
        "file": sha256(task.path.read_bytes()).hexdigest(),
        "settings": task.settings(),
        **fingerprints(worker),
    }


def fingerprints(worker: Worker) -> dict[str, str]:
    """Digests of a model's kind and a little of each of its weights, and of its tokenizer."""
    model, tokenizer = worker.model, worker.tokenizer
    found = sha256(f"{model.config}".encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {getattr(value, 'dtype', '')}".encode())
        if isinstance(value, torch.Tensor):
            some = value.detach().reshape(-1)[:_PER_TENSOR]
            found.update(some.to("cpu", torch.float64).numpy().tobytes())
    said = f"{tokenizer.backend.to_str()}{tokenizer.chat_templates}"
    return {"model": found.hexdigest(), "tokenizer": sha256(said.encode()).hexdigest()}
