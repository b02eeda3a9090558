"""From a path or a name to a model and its tokenizer: Hugging Face directories and GGUF files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.files.gguf import open_gguf
from polyhead.files.hub import resolve
from polyhead.files.jsons import read_json
from polyhead.files.safetensors import open_checkpoint
from polyhead.models import gguf
from polyhead.models.assemble import from_tensors
from polyhead.models.config import Config
from polyhead.models.config_json import from_hf
from polyhead.models.model import TaskModel
from polyhead.models.registry import family_of
from polyhead.models.sentence import read_sentences
from polyhead.text.tokenizer import Tokenizer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


Checkpoint = tuple[dict[str, Any], Mapping[str, Tensor]]
"""A `config.json` and tensors by Hugging Face's names, read when asked."""

_ELSE = "the original checkpoint or a GGUF file"


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a directory, a .safetensors or a GGUF file."""
    if path.suffix == ".gguf":
        config, tensors, _ = gguf.read(path)
        return config, tensors
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        if steps := sorted((folder / "checkpoints").glob("step-*")):
            raise FileError(f"{folder} is a training run; name a checkpoint, such as {steps[-1]}")
        raise FileError(f"{folder} has no config.json; name a model directory or a .gguf file")
    return read_json(folder / "config.json"), open_checkpoint(path)


def load(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    head: str | None = None,
    revision: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    problem: str | None = None,
    tasks: Mapping[str, Any] | None = None,
    read: Callable[[Path], Checkpoint] = read_checkpoint,
    fill: Callable[[TaskModel, Mapping[str, Tensor]], None] | None = None,
) -> TaskModel:
    """A model from a Hugging Face directory, a GGUF file, a hub id or a named model.

    dtype: None keeps what the checkpoint says, but float16, for which CPUs have no fast path, and
    GGUF's packed blocks become float32. device: None is the CPU. head: "lm", "classify", "none"
    and others; None takes it from the checkpoint's `architectures`. A head that is named here and
    that the checkpoint does not have is drawn fresh, to be trained; `labels` are the names of its
    classes, `problem` and `tasks` as in `Config`. The model is in evaluation mode.
    read: what reads a checkpoint; where it gives tensors on the meta device, fill(model, tensors)
    puts the weights in.

    Raises ConfigError for what a config says that cannot be, FileError for broken files.
    """
    path = resolve(str(name), revision)
    data, tensors = read(path)
    config, there = described(data, path)
    config = _told(config, labels, problem, tasks)
    wanted = _asked(config, head, there)
    is_new = wanted != there or (labels or tasks) is not None
    model = from_tensors(config, tensors, wanted, _dtype(dtype, data, path), is_new)
    if fill is not None:
        fill(model, tensors)
    if path.is_dir() and (sentences := read_sentences(path)) is not None:
        model.sentences = sentences
        if wanted == "embed":
            model.head = sentences.pooling.to(model.dtype)
    model.generation = read_json(path / "generation_config.json") if path.is_dir() else {}
    model.origin = str(path.absolute()) if Path(name).expanduser().exists() else str(name)
    return model if device is None else _moved(model, device)


def _moved(model: TaskModel, device: torch.device | str) -> TaskModel:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}") from None


def tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a model directory, a GGUF file, a hub id or a named model.

    Raises FileError where there is none or it cannot be read.
    """
    path = resolve(str(name), revision)
    if path.suffix == ".gguf":
        return Tokenizer.from_gguf(open_gguf(path).metadata)
    return Tokenizer.load(path.parent if path.suffix == ".safetensors" else path)


def described(data: Mapping[str, Any], path: Path) -> tuple[Config, str | None]:
    """What a `config.json`, read from `path`, says: the config, and the head that `architectures`
    names, None for one not known here."""
    config = from_hf(family_of(_model_type(data, path)).config, data)
    row = config.row(config.model_type)
    named = data.get("architectures") or [row.architecture(next(iter(row.heads), "none"))]
    return config, row.head_of(str(named[0] if isinstance(named, list) else named))


def _model_type(data: Mapping[str, Any], path: Path) -> str:
    if not isinstance(data.get("model_type"), str):
        raise ConfigError(f"{path} says no model_type in its config.json; it is needed")
    if how := data.get("quantization_config"):
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
        raise ConfigError(
            f"{path} is quantised ({method}); load "
            + ("what `polyhead convert` makes of it" if method == "polyhead" else _ELSE)
        )
    return data["model_type"]


def _told(
    config: Config,
    labels: Sequence[str] | None,
    problem: str | None,
    tasks: Mapping[str, Any] | None,
) -> Config:
    """The config with what the caller says of the head."""
    if isinstance(labels, str):
        raise ConfigError(f"labels is the text {labels!r}; pass a list of names")
    said = {"labels": None if labels is None else tuple(labels), "problem": problem, "tasks": tasks}
    return replace(config, **{name: value for name, value in said.items() if value is not None})


def _asked(config: Config, asked: str | None, there: str | None) -> str:
    row = config.row(config.model_type)
    if asked is not None:
        if asked != "none":
            row.kind(asked)
        return asked
    if there is None:
        raise ConfigError(
            f"architecture {config.source['architectures']} has a head that is not supported; "
            f"load it with head= one of {', '.join([*row.heads, 'none'])}"
        )
    return there


def _dtype(
    asked: torch.dtype | str | None, data: Mapping[str, Any], path: Path
) -> torch.dtype | None:
    if isinstance(asked, str):
        if asked not in DTYPES:
            raise ConfigError(f"dtype {asked!r} is not one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    if asked is not None:
        return asked
    if path.suffix == ".gguf":
        return torch.float32
    said = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    return torch.bfloat16 if said == "bfloat16" else torch.float32
