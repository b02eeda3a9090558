"""A built model in fewer bits, by surgery: no model file knows of it."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from polyhead.compress import awq, gptq
from polyhead.compress.calibrate import Batch, Walk
from polyhead.compress.formats import FORMATS, GROUPS, STEPS, PackedWeight, Stepped, form_named
from polyhead.compress.layers import (
    Form,
    language_heads,
    pack_experts,
    pack_layer,
    tie_vocabulary,
)
from polyhead.compress.saved import PackedModel
from polyhead.compress.steps import Grid
from polyhead.compress.tune import tune
from polyhead.errors import ConfigError
from polyhead.models.model import BESIDE, TaskModel
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.moe import Experts

CALIBRATED = {"gptq": gptq.settle, "awq": awq.settle}
"""Ways to round by what the layers read."""
METHODS = ("nearest", *CALIBRATED)


def quantize(
    model: TaskModel,
    form: str = "nf4",
    *,
    embeddings: str | None = None,
    group: int = STEPS,
    method: str = "nearest",
    calibration: Sequence[Batch] = (),
    tuning: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskModel:
    """A copy of `model` whose matrices are kept in few bits and unpacked when they are used.

    form:        "nf4": 4.13 bits a weight (QLoRA, Dettmers et al. 2023), "nf6": 6.13, "int4": 5, in
                 even steps for each 32 weights, "int8": 8.5, a scale for each 32, "int8-rows": 8,
                 a scale a row, "fp16" and "bf16": 16. What begins with int `pack` makes fast.
    embeddings:  of the tables of tokens and the language heads, which bear few bits ill; "none"
                 leaves them as they are, None is nf6 with nf4 and nf6, the form itself if it has 16
                 bits, else int8.
    group:       of int4 and int8, weights that share their steps: 32, or 64 or 128 where that
                 divides every layer's width.
    method:      of int4 and int8: "nearest"; "gptq": columns make up for the rounding of those
                 before them (Frantar et al. 2022); "awq": columns that read much are scaled up
                 first, where their writer can be scaled down (Lin et al. 2023).
    calibration: what the latter two run the model on: token ids `[B, T]` each, or arguments of the
                 model by their names. A few ten thousand tokens like those to come. What the
                 blocks answer to them is kept in memory meanwhile. Layers that they do not reach
                 are rounded to the nearest.
    tuning:      of int4 with calibration: how many times it is read again, to move the steps until
                 the model answers as the old one (EfficientQAT, Chen et al. 2024); None is once
                 after "gptq". Takes the memory of training on a batch.
    progress:    is told how many blocks are done, and of how many; then of tuning's batches.
    Linear layers and experts of the backbone are packed; norms, biases, routers and other heads
    stay. The copy computes in the old model's dtype; its matrices do not learn: an adapter can. It
    saves and loads in few bits. The old model is untouched.
    Errors: ConfigError for another form, group or method, a layer that the group does not divide,
    calibration that the model does not take, tuning of another form or without calibration, and a
    model that has adapters or is packed already.
    """
    grid = _grid(form, group, method, bool(calibration))
    passes = _passes(tuning, form, method, bool(calibration))
    finer = embeddings or finer_form(form)
    packing = form_named(form if group == STEPS else f"{form}-{group}")
    packing_finer = None if finer == "none" else _named(finer)
    names = dict(model.named_modules())
    if any(f".{BESIDE}." in name or hasattr(part, "packed") for name, part in names.items()):
        raise ConfigError(
            "the model has adapters or few bits already; start from a plain one, or from what "
            "`polyhead convert` makes of it"
        )
    _check_widths(model, group)
    found, layers, tables = _copied(model, packing_finer is not None)
    if packing_finer is not None:
        _pack_vocabulary(found, tables, packing_finer)
    if grid is not None:
        layers = _calibrated(found, layers, grid, method, calibration, progress)
    for layer in layers:
        if isinstance(layer, Experts):
            pack_experts(layer, packing)
        else:
            pack_layer(layer, packing)
    if passes:
        tune(found, model, calibration, passes, progress)
    found.__class__ = PackedModel
    return found


def _passes(tuning: int | None, form: str, method: str, is_calibrated: bool) -> int:
    """How many times the calibration is read to move steps."""
    if tuning is None:
        return int(form == "int4" and method == "gptq")
    if tuning < 0 or (tuning and (form != "int4" or not is_calibrated)):
        raise ConfigError(
            f"tuning is {tuning} with form {form!r}: give 0, or for int4 with calibration how many "
            "times that is read"
        )
    return tuning


def _calibrated(
    model: TaskModel,
    layers: Sequence[nn.Module],
    grid: Grid,
    method: str,
    calibration: Sequence[Batch],
    progress: Callable[[int, int], None] | None,
) -> list[nn.Module]:
    """Pack layers by what they read; those that stay as they are never read anything."""
    modes = {part: part.training for part in model.modules()}
    walk = Walk(model.eval(), calibration, layers)
    for number, unit in enumerate(walk.units):
        CALIBRATED[method](walk, unit, grid)
        walk.finish(unit)
        if progress is not None:
            progress(number + 1, len(walk.units))
    for part, mode in modes.items():
        part.training = mode
    reached = {layer for unit in walk.units for group in unit.groups for layer in group.layers}
    return [layer for layer in layers if layer not in reached]


def _grid(form: str, group: int, method: str, is_calibrated: bool) -> Grid | None:
    """What to round to by calibration; None to round to the nearest."""
    kind = _named(form)
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    if group not in GROUPS:
        raise ConfigError(f"group is {group}: choose one of {', '.join(map(str, GROUPS))}")
    if not issubclass(kind, Stepped):
        if method != "nearest" or group != STEPS:
            raise ConfigError(f"form {form!r} has no even steps in groups: use int4 or int8")
        return None
    if method == "nearest":
        return None
    if not is_calibrated:
        raise ConfigError(f"method {method!r} needs calibration: some inputs like those to come")
    return Grid(kind, group)


def _named(form: str) -> type[PackedWeight]:
    if form not in FORMATS:
        raise ConfigError(f"form is {form!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[form]


def finer_form(form: str) -> str:
    """What the tables of tokens and language heads are kept in."""
    return {"nf4": "nf6", "nf6": "nf6", "fp16": "fp16", "bf16": "bf16"}.get(form, "int8")


def _check_widths(model: TaskModel, group: int) -> None:
    """ConfigError for a layer whose width a group larger than the usual does not divide."""
    for name, part in model.backbone.named_modules(prefix="backbone"):
        weights = part.parameters(recurse=False) if type(part) in (nn.Linear, Experts) else ()
        widths = {weight.shape[-1] for weight in weights if weight.ndim >= 2}
        if group != STEPS and (odd := [width for width in widths if width % group]):
            raise ConfigError(
                f"group {group} does not divide {name}, which is {odd[0]} wide: use {STEPS}"
            )


def _pack_vocabulary(model: TaskModel, tables: Sequence[nn.Module], form: Form) -> None:
    for table in tables:
        pack_layer(table, form)
    tie_vocabulary(model)
    for head in [] if model.is_tied else language_heads(model):
        pack_layer(head, form)


def weight_bytes(model: nn.Module, beside: nn.Module | None = None) -> int:
    """What a model's weights take in memory, each counted once, but for those that `beside` holds
    as well."""
    theirs = {} if beside is None else _by_place(beside)
    own = [tensor for place, tensor in _by_place(model).items() if place not in theirs]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _by_place(model: nn.Module) -> dict[int, Tensor]:
    """A model's weights by where they lie; oneDNN's own layouts do not say, and are told apart."""
    every = [*model.parameters(), *model.buffers()]
    return {id(tensor) if tensor.is_mkldnn else tensor.data_ptr(): tensor for tensor in every}


def _copied(
    model: TaskModel, embeddings: bool
) -> tuple[TaskModel, list[nn.Module], list[nn.Module]]:
    """The model with what is to be packed shared, and where that is: layers and tables."""
    backbone = list(model.backbone.modules())
    layers = [part for part in backbone if type(part) in (nn.Linear, Experts)]
    tables = [part for part in backbone if type(part) is TokenEmbedding] if embeddings else []
    heads = language_heads(model) if embeddings else []
    shared = [p for part in (*layers, *heads) for p in part.parameters() if p.ndim >= 2]
    shared += [table.weight for table in tables]
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    found = copy.deepcopy(model, memo)
    return found, [memo[id(layer)] for layer in layers], [memo[id(table)] for table in tables]
