"""A run's own beginning as its teacher: the model as the run found it, kept for when it goes on."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from polyhead.adapt.load import load
from polyhead.errors import ConfigError, FileError, PolyheadError
from polyhead.files.disk import atomic_file
from polyhead.files.jsons import read_json
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_file
from polyhead.files.views import tensor_bytes
from polyhead.models.model import BESIDE, TaskModel

SELF = "self"
KEPT, SAID = "teacher.safetensors", "teacher.json"
"""In a run's directory: the teacher's weights, or where they come from, and their digest."""


def check_self_teacher(model: TaskModel) -> None:
    """ConfigError for a model of which an adapter alone learns."""
    if any(f".{BESIDE}." in name for name, _ in model.named_modules()):
        raise ConfigError(
            "teacher is 'self', and an adapter learns: name the checkpoint beneath it in its place"
        )


def check_teacher(model: TaskModel, teacher: TaskModel) -> None:
    """ConfigError for a teacher of another kind: it reads other things, or the answers."""
    kinds = [getattr(each.config, "kind", "decoder") for each in (teacher, model)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"the teacher, {teacher.config.model_type}, is of the kind {kinds[0]}, and the model "
            f"of the kind {kinds[1]}: take a teacher of that kind"
        )


def as_found(model: TaskModel) -> TaskModel:
    """A copy of a model that learns nothing."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def keep(teacher: TaskModel, run: Path) -> None:
    """Let a run know its teacher: by the checkpoint that it is, where it is one, else whole."""
    digest = _digest(teacher.state_dict())
    origin = teacher.origin if _is_origin(teacher, digest, run) else None
    if origin is None:
        write_file(run / KEPT, teacher.state_dict())
    dtype = str(teacher.dtype).removeprefix("torch.")
    with atomic_file(run / SAID) as file:
        said = {"origin": origin, "dtype": dtype, "sha256": digest}
        file.write(json.dumps(said, indent=2).encode())


def taken_up(model: TaskModel, run: Path) -> TaskModel:
    """The teacher that a run began with; `model` is of the same making, its weights do not count.

    Errors: FileError where it is gone, or another by now.
    """
    if not (run / SAID).exists():
        raise FileError(f"{run / SAID} is missing, which the run began with: begin anew")
    said: Any = read_json(run / SAID)
    if said.get("origin") is None:
        path = run / KEPT
        if not path.exists():
            raise FileError(f"{path} is missing, which the run began with: begin anew")
        found = as_found(model)
        found.load_state_dict(dict(open_checkpoint(path)), assign=True)
    else:
        path = said["origin"]
        found = load(path, dtype=said["dtype"], head=model.head_kind)
    if _digest(found.state_dict()) != said.get("sha256"):
        raise FileError(f"{path} is not the teacher that {run} began with any more: begin anew")
    return found.requires_grad_(False).eval()


def _is_origin(teacher: TaskModel, digest: str, run: Path) -> bool:
    """Whether the checkpoint that a model came from holds just that model, and will stay."""
    if teacher.origin is None or Path(teacher.origin).is_relative_to(run.absolute()):
        return False
    try:
        again = load(teacher.origin, dtype=teacher.dtype, head=teacher.head_kind)
        return _digest(again.state_dict()) == digest
    except PolyheadError:
        return False


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and every bit."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {state[name].dtype} {list(state[name].shape)}\n".encode())
        found.update(tensor_bytes(state[name]))
    return found.hexdigest()
