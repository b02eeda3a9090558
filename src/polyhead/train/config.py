"""Every setting of a training run, in one value that flags, TOML and checkpoints share.

Nothing here imports torch or numpy, so that `polyhead train --help` stays quick.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from polyhead.errors import ConfigError, FileError
from polyhead.files.toml import read_toml

Schedule = Literal["cosine", "linear", "constant", "wsd"]
TrainDtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "muon", "lion", "schedule-free"]
Recompute = Literal["none", "blocks", "half"]
Parallelism = Literal["ddp", "fsdp"]
PruneBy = Literal["layer", "global", "2:4", "heads", "neurons"]
Qat = Literal["none", "int8", "int4", "nf6", "nf4"]

# What may differ when a run is taken up again: nothing here touches the numbers. `steps` is judged
# by itself, by the learning rates it leads to (checkpoint.py).
FREE_ON_RESUME = (
    *("steps", "validate_every", "validate_batches", "checkpoint_every", "keep", "log_every"),
    *("out", "cache", "device", "sample_every", "sample_prompt", "sample_tokens", "epochs"),
    *("skips", "recompute", "parallel", "offload", "tensor", "compile"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. A step sees `batch_size * accumulate` windows of `context` tokens."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    epochs: float | None = None
    """How often the run sees every row, in place of `steps`."""
    batch_size: int = 16
    """Windows a forward pass sees at once."""
    context: int = 256
    """Tokens a window predicts, at most what the model takes; of a table's texts, the most that
    are read."""
    accumulate: int = 1
    """Forward passes whose gradients make one step, divided by the tokens of the whole step."""
    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the run (cosine, linear, wsd); a tenth of `lr` when not given."""
    warmup: int = 100
    """Steps over which the learning rate rises from nothing to `lr`; in a run that is not longer
    than that, a tenth of the run."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up; wsd stays at `lr`, then falls linearly."""
    decay: float = 0.2
    """Share of the steps over which wsd falls."""
    optimizer: OptimizerName = "adamw"
    """adamw; muon for the matrices of blocks with adamw for the rest; lion, with a third to a tenth
    of adamw's lr; schedule-free, AdamW at a constant lr whose average is the model."""
    layer_decay: float = 1.0
    """What the learning rate is multiplied by for each block that lies above a weight."""
    rates: tuple[str, ...] = ()
    """Factors of the learning rate for parameters whose names hold a text, as in head=10."""
    weight_decay: float = 0.1
    """Decoupled decay of every weight of two or more dimensions (norms and biases have none)."""
    decays: tuple[str, ...] = ()
    """Weight decay of parameters whose names hold a text, as in embedding=0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest norm of a step's gradient; 0 leaves it as it is."""
    zclip: float = 0.0
    """Above 0: clip gradients whose norm lies so many standard deviations above its running mean;
    2.5 is usual."""
    rewind: float = 0.0
    """Above 0: where the loss lies so many standard deviations above its running mean, go back to
    the last checkpoint and pass by the data since; 6 is cautious."""
    skips: int = 10
    """Steps in a row that may be left out as their loss or gradient is no number, and rewinds of a
    whole run, before it stops."""
    ema: float = 0.0
    """Above 0: keep a moving average of the weights, as 0.999, and validate and save that."""
    prune: float = 0.0
    """Above 0: the share of the weights in the blocks' matrices that become zero, step by step, and
    stay so: those of least magnitude."""
    prune_by: PruneBy = "layer"
    """Magnitudes are compared in each matrix (layer) or in all (global); 2:4 leaves two of every
    four side by side, with prune = 0.5. heads and neurons go whole, as `shrink` would take them:
    they write nothing any more, and it takes them away without a change of answers."""
    prune_targets: tuple[str, ...] = ()
    """Matrices to prune, by parts of their names, as ffn; not given: all of the blocks'."""
    prune_begin: float = 0.1
    """Share of the run after which pruning begins."""
    prune_end: float = 0.7
    """Share of the run after which all of `prune` is zero; the rest of it mends what that did."""
    prune_every: int = 10
    """Steps from one pruning to the next."""
    qat: Qat = "none"
    """Weights are rounded whenever they are read, as `quantize` will keep them, while the floats
    beneath learn (quantisation-aware training)."""
    dtype: TrainDtype = "float32"
    """Type of weights and gradients; bfloat16 keeps float32 masters and moments beside them."""
    recompute: Recompute = "none"
    """Activations of blocks, or of every second one (half), that are made again on the way back and
    not kept: a third more work in a fraction of the memory."""
    parallel: Parallelism = "ddp"
    """On several processes of torchrun: ddp (each has the whole model) or fsdp (each a part)."""
    offload: bool = False
    """With fsdp: weights and moments wait in the CPU's memory."""
    tensor: int = 1
    """Above 1: so many neighbouring processes hold each layer together and see the same batches;
    where there are more, such groups share the data by fsdp."""
    compile: bool = False
    """Blocks run as torch.compile makes them, while training; the first step takes longer."""
    seed: int = 0
    """Order of the data and dropout."""
    held_out: float = 0.05
    """Share of the tokens, the last ones, kept for validation when no validation text is given."""
    validate_every: int = 250
    """Steps between validations (also at every checkpoint and at the end); 0 for the end alone."""
    validate_batches: int = 16
    """Batches a validation reads, spread evenly over the held-out text; 0 reads all of it."""
    checkpoint_every: int = 500
    """Steps between checkpoints (there is always one at the end); 0 for the end alone."""
    keep: int = 2
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    log_every: int = 10
    """Steps between lines of the log."""
    sample_every: int = 0
    """Steps between samples written by the model; 0 writes none."""
    sample_prompt: str = ""
    """What a sample begins with."""
    sample_tokens: int = 64
    """Tokens of a sample."""
    out: str = "runs/train"
    """Run directory: config.toml, log.jsonl, checkpoints/."""
    cache: str | None = None
    """Folder for tokenised corpora; `tokens` in the run directory when not given."""
    device: str | None = None
    """Where to train (cpu, cuda, cuda:1); a GPU is taken when there is one."""

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise ConfigError(f"{name} is {value}: it must be a number of at least {low}")
        choices = {
            "schedule": Schedule, "dtype": TrainDtype, "optimizer": OptimizerName,
            "recompute": Recompute, "parallel": Parallelism, "prune_by": PruneBy,
            "qat": Qat,
        }  # fmt: skip
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ConfigError(f"{name} is {getattr(self, name)!r}: choose one of {known}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs is {self.epochs}: it must be above 0")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}: it must be above 0")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"min_lr is {self.min_lr}: it must not exceed lr, which is {self.lr}")
        for name in ("betas", "rates", "decays", "prune_targets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}: two numbers from 0 up to, not including, 1")
        if self.ema and self.optimizer == "schedule-free":
            raise ConfigError(f"ema is {self.ema}: schedule-free has an average of its own, use 0")
        for name in ("held_out", "decay", "ema", "prune"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: a share from 0 to below 1")
        if not 0 <= self.prune_begin <= self.prune_end <= 1:
            raise ConfigError(
                f"prune_begin is {self.prune_begin} and prune_end {self.prune_end}: shares of the "
                "run, from 0 to 1, the first not above the second"
            )

    @classmethod
    def fine_tuning(cls, **settings: Any) -> Self:
        """Settings for a checkpoint that learns a task from a table, but for those named.

        Three epochs at 5e-5 as Devlin et al. (2019) advise, falling to 0; everything held out is
        validated on, and the best checkpoint is kept. `steps` takes the place of the epochs.
        """
        if settings.get("epochs") is not None and "steps" in settings:
            raise ConfigError("steps and epochs both say how long a run is: name one of them")
        counts = {"epochs": None} if "steps" in settings else {}
        return cls(**{**FINE_TUNING, **counts, **settings})

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON and TOML hold it."""
        values = dataclasses.asdict(self).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the settings") -> Self:
        """Build from plain values; unknown names and wrong types are a ConfigError at `where`."""
        hints = get_type_hints(cls)
        if unknown := sorted(set(values) - set(hints)):
            raise ConfigError(
                f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(hints)}"
            )
        typed = {
            name: _as(hints[name], value, f"{where}: {name}") for name, value in values.items()
        }
        return cls(**typed)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a TOML file of fields; a field that is missing has its default."""
        return cls.from_dict(read_toml(path), str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field as TOML; a field that is None is left out."""
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        text = "".join(f"{name} = {_toml(value)}\n" for name, value in given.items())
        temp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
        try:
            temp.write_text(text, encoding="utf-8")
            temp.replace(path)
        except OSError as error:
            temp.unlink(missing_ok=True)
            raise FileError(f"{path} cannot be written ({error.strerror}): make room") from None


FINE_TUNING: dict[str, Any] = {
    "epochs": 3.0,
    "batch_size": 32,
    "lr": 5e-5,
    "min_lr": 0.0,
    "warmup": 50,
    "schedule": "linear",
    "weight_decay": 0.01,
    "betas": (0.9, 0.999),
    "held_out": 0.1,
    "validate_every": 100,
    "validate_batches": 0,
    "checkpoint_every": 0,
    "keep": 1,
}

_LOWEST: dict[str, float] = {
    **dict.fromkeys(("steps", "batch_size", "context", "accumulate", "tensor"), 1),
    **dict.fromkeys(("keep", "log_every", "prune_every"), 1),
    **dict.fromkeys(("lr", "min_lr", "warmup", "weight_decay", "eps", "clip", "seed"), 0),
    **dict.fromkeys(("zclip", "rewind", "skips", "layer_decay"), 0),
    **dict.fromkeys(("validate_every", "validate_batches", "checkpoint_every"), 0),
    **dict.fromkeys(("sample_every", "sample_tokens"), 0),
}


def _as(kind: Any, value: Any, where: str) -> Any:
    """`value` as a field of type `kind`, or ConfigError."""
    if get_origin(kind) is UnionType:
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ConfigError(f"{where} is {value!r}: choose one of {', '.join(get_args(kind))}")
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_as(get_args(kind)[0], item, where) for item in value)
        raise ConfigError(f"{where} is {value!r}: it must be a list")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} is {value!r}: it must be of type {kind.__name__}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
