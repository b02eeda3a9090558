"""A model from a directory or a name, those of adapters included."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyhead.adapt.peft import CONFIG, load_adapter
from polyhead.compress import blocks, saved
from polyhead.errors import FileError
from polyhead.files.hub import resolve
from polyhead.files.jsons import read_json
from polyhead.models.load import described
from polyhead.models.load import load as load_model
from polyhead.models.load import tokenizer as load_tokenizer
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

# The head that an adapter was made for, where nothing else says it.
_HEADS = {"SEQ_CLS": "classify", "TOKEN_CLS": "tag", "QUESTION_ANS": "answer"}
_TOLD = ("labels", "problem", "tasks")


def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    head: str | None = None,
    revision: str | None = None,
    *,
    adapter: str | Path | None = None,
    change: Callable[[TaskModel], TaskModel] | None = None,
    packed: bool | str | Collection[str] = False,
    labels: Sequence[str] | None = None,
    problem: str | None = None,
    tasks: Mapping[str, Any] | None = None,
) -> TaskModel:
    """A model from a Hugging Face directory, a GGUF file, a hub id or a named model.

    The directory of an adapter gives the model that it names with the adapter on it; `adapter` puts
    one on the model that is named. change: what becomes of that before, such as `quantize`. What
    was saved in few bits comes back so.
    dtype: None keeps what the checkpoint says, but float16, for which CPUs have no fast path, and
    GGUF's blocks become float32. device: None is the CPU. head: "lm", "classify", "none" and
    others; None takes it from the checkpoint's `architectures`. A head that is named here and that
    the checkpoint does not have is drawn fresh, to be trained; `labels` are the names of its
    classes, `problem` and `tasks` as in `Config`. The model is in evaluation mode.
    packed: of a GGUF file, keep matrices in the blocks that they have there, all or those of the
    named kinds ("Q4_0", "Q8_0", ...); they are unpacked when they are used, and do not learn.

    Raises ConfigError for what a config says that cannot be, FileError for broken files.
    """
    path = resolve(str(name), revision)
    told: dict[str, Any] = {"labels": labels, "problem": problem, "tasks": tasks}
    if is_adapter(path):
        if adapter is not None:
            raise FileError(f"{path} is an adapter already; put the other on with load_adapter")
        name, adapter = base_of(path), path
    if adapter is not None and head is None and labels is None and tasks is None:
        head, said = _head_beside(Path(adapter), name)
        told |= said
    model = load_model(name, dtype, device, head, revision, **_reading(packed), **told)
    if change is not None:
        model = change(model)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model directory, a GGUF file, a hub id or a named model; an adapter's is
    its model's, where it has none.

    Raises FileError where there is none or it cannot be read.
    """
    path = resolve(str(name), revision)
    bare = is_adapter(path) and not any(path.glob("tokenizer*"))
    return load_tokenizer(base_of(path) if bare else name, None if bare else revision)


def _reading(packed: bool | str | Collection[str]) -> dict[str, Any]:
    """How `load_model` is to read and fill."""
    if not packed:
        return {"read": saved.read, "fill": saved.fill}
    return {"read": blocks.read, "fill": partial(blocks.fill, blocks.kinds_named(packed))}


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model of its own."""
    return (path / CONFIG).is_file() and not any(path.glob("model*.safetensors"))


def base_of(path: Path) -> str:
    """The model that an adapter's directory names; FileError where it names none."""
    base = read_json(path / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise FileError(
            f"{path} is an adapter that names no model: load the model it was made for, and put it "
            "on with load_adapter"
        )
    return base


def _head_beside(adapter: Path, base: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The head that an adapter was made for, and what it tells apart; both are left open where the
    base has that very head."""
    own = adapter / "config.json"
    if not own.is_file():
        return _HEADS.get(read_json(adapter / CONFIG).get("task_type", "")), {}
    config, head = described(read_json(own), own)
    path = resolve(str(base))
    theirs, there = described(saved.read(path)[0], path)
    if head == there and all(getattr(config, key) == getattr(theirs, key) for key in _TOLD):
        return None, {}
    return head, {key: getattr(config, key) for key in _TOLD}
