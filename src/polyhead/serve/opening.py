"""Opening a model as it is to run: resolved, loaded, in few bits, with an adapter, laid out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polyhead.errors import ConfigError
from polyhead.files.spinner import spinner

if TYPE_CHECKING:
    import torch

    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Packing takes as long as it saves on about so much text, whatever the model: both grow with it.
_WORTH_PACKING = 2000  # characters
_AN_IMAGE = 800  # what an image's patches are in characters


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Where and how a model is loaded."""

    dtype: Dtype = "auto"
    """Type of the weights; auto keeps the checkpoint's, and where text is written on a CPU with
    VNNI a GGUF file's blocks of 4 and 8 bits: they are less to read, and several times as fast."""
    device: str | None = None
    """Where to run (cpu, cuda, cuda:1); a GPU is taken when there is one."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    adapter: str | None = None
    """Directory of a LoRA adapter to put on the model; one that names its model can stand in the
    model's place."""
    quantize: Literal["int8", "int4"] | None = None
    """Keep the weights in so many bits: less memory, and on a CPU with VNNI several times the
    speed, for answers that differ a little."""

    def open(
        self, name: str, texts: Sequence[str] = (), *, writes: bool = False
    ) -> "tuple[TaskModel, Tokenizer]":
        """A model and its tokenizer, ready to run; packed for a CPU where many texts await it.

        writes: texts, token by token, for which a GGUF file's blocks are the fastest weights.
        """
        from polyhead.adapt.load import tokenizer

        model, path = self.open_model(name, texts, writes=writes)
        if getattr(model.config, "kind", "") == "vision":
            raise ConfigError(
                f"{name} is a {model.config.model_type}, which reads images; name a model of "
                "texts, or use polyhead classify"
            )
        return model, tokenizer(path)

    def open_model(
        self, name: str, inputs: Sequence[str] = (), *, writes: bool = False
    ) -> "tuple[TaskModel, Path]":
        """A model, ready to run, and where it lies; packed where many texts or images await it."""
        with spinner(f"loading {name}", quiet=not sys.stderr.isatty()):
            from polyhead.adapt.load import load
            from polyhead.files.hub import resolve

            path, device = model_path(resolve(name, self.revision)), device_named(self.device)
            dtype = None if self.dtype == "auto" else self.dtype
            adapter = None if self.adapter is None else model_path(Path(self.adapter))
            is_plain = dtype is None and self.quantize is None
            kinds = _kinds_multiplied(path, device) if writes and is_plain else ()
            model = load(path, dtype=dtype, adapter=adapter, packed=kinds)
            if self.quantize is not None:
                from polyhead.compress.quantize import quantize

                model = quantize(model, self.quantize)
            return _packed(model.to(device), inputs), path


def _kinds_multiplied(path: Path, device: "torch.device") -> tuple[str, ...]:
    """The kinds of a GGUF file's blocks that are multiplied here, faster than floats."""
    if path.suffix != ".gguf" or device.type != "cpu":
        return ()
    import torch

    from polyhead.compress.blocks import FAST
    from polyhead.kernels.native import library

    is_fast = torch.cpu._is_vnni_supported() and library("products") is not None
    return FAST if is_fast else ()


def _packed(model: "TaskModel", inputs: Sequence[str]) -> "TaskModel":
    """The model laid out for a CPU where that wins back its time, as it does with few bits."""
    from polyhead.compress.formats import PackedWeight

    reads_images = getattr(model.config, "kind", "") in ("vision", "two towers")
    work = len(inputs) * _AN_IMAGE if reads_images else sum(map(len, inputs))
    is_small = any(isinstance(part, PackedWeight) for part in model.modules())
    if model.device.type != "cpu" or not (is_small or work >= _WORTH_PACKING):
        return model
    from polyhead.kernels import pack

    return pack(model)


def device_named(name: str | None) -> "torch.device":
    """A device that is there; None is a GPU, or else the CPU."""
    import torch

    try:
        return torch.empty(
            0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")
        ).device
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device {name!r} is not there; use cpu, or leave it out") from None


def model_path(path: Path) -> Path:
    """A path, or of a training run's directory its checkpoint: the best by the objective's metric,
    where it has one, or the newest."""
    if path.is_dir() and not (path / "config.json").exists() and (path / "checkpoints").is_dir():
        from polyhead.train.checkpoint import best, best_score, latest

        chosen = latest(path) if best_score(path) is None else best(path)
        return chosen or path
    return path
