"""What is known of samples already, on disk, so that a run that was stopped goes on."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from polyhead.files.journal import Journal
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.task import LocalTask, Worker
from polyhead.text.tokenizer import Tokenizer

_PER_TENSOR = 64  # numbers that stand for it


class Kept(Journal):
    """A task's records in `NAME.jsonl`, a line each, and what they are of in `NAME.json`.

    `records`: those of an earlier run.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any], force: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines, about = folder / f"{name}.jsonl", folder / f"{name}.json"
        super().__init__(lines, about, identity, kind="evaluation", force=force)
        self.records = list(self)


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
        **fingerprints(worker.model, worker.tokenizer),
    }


def fingerprints(model: TaskModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of a model's kind and a little of each of its weights, and of its tokenizer."""
    found = sha256(f"{model.config}".encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {getattr(value, 'dtype', '')}".encode())
        if isinstance(value, torch.Tensor):
            some = value.detach().reshape(-1)[:_PER_TENSOR]
            found.update(some.to("cpu", torch.float64).numpy().tobytes())
    said = f"{tokenizer.backend.to_str()}{tokenizer.chat_templates}"
    return {"model": found.hexdigest(), "tokenizer": sha256(said.encode()).hexdigest()}
