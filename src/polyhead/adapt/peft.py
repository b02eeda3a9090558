"""PEFT's adapters in and out: adapter_config.json and adapter_model.safetensors."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.adapt.adapters import DEFAULT, adapters_of, place_adapter
from polyhead.adapt.base import base_digest
from polyhead.adapt.lora import Adapted, Delta, LoraConfig, adapted_layers
from polyhead.adapt.names import Place, linear_places
from polyhead.adapt.whole import check_tied, saved_modules, written_whole
from polyhead.errors import ConfigError, FileError
from polyhead.files.disk import atomic_file
from polyhead.files.jsons import read_json
from polyhead.files.safetensors import SafetensorsFile
from polyhead.files.safetensors_write import write_file
from polyhead.models.assemble import known_names
from polyhead.models.keys import to_ours
from polyhead.models.model import BESIDE, TaskModel, checkpoint_rules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Beside the tensors: a digest of the base, and the ranks of the layers here, which may share a
# module there.
_BASE, _RANKS = "polyhead_base", "polyhead_ranks"
_BASE_NAME = "base_model_name_or_path"
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# What PEFT can do beside and this library does not read, with the value that means it is not done.
_NOT_READ = {"bias": "none", "layer_replication": None, "megatron_config": None, "lora_bias": False}
# How A and B began, where that left the base as it was; others took from it what they were given.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(
    model: TaskModel, directory: str | Path, name: str = DEFAULT, *, base: str | None = None,
    force: bool = False,
) -> None:  # fmt: skip
    """Write an adapter as PEFT does, alone: without the model it belongs to.

    base: where that model is to be found, for those who read the directory; None is where it was
    loaded from. A digest of its weights goes into the file of the adapter's.
    Errors: ConfigError for a name that is not there, FileError where an adapter stands already.
    """
    folder = Path(directory)
    if name not in adapters_of(model):
        raise ConfigError(f"the model has no adapter {name!r}")
    if (folder / CONFIG).exists() and not force:
        raise FileError(f"{folder} holds an adapter already; choose another place or use force")
    config = adapters_of(model)[name]
    layers = {path: layer for path, layer in adapted_layers(model) if name in layer.adapters}
    tensors: dict[str, Tensor] = {}
    settings: dict[str, tuple[int, float]] = {}
    bare = _prefix_left_out(model)
    for place in _modules(linear_places(model), layers):
        a, b, magnitude = _joined(model, place, name)
        theirs = place.theirs.removeprefix(bare)
        tensors[f"{_PREFIX}{theirs}{_A}"], tensors[f"{_PREFIX}{theirs}{_B}"] = a, b
        if magnitude is not None:
            tensors[f"{_PREFIX}{theirs}{_MAGNITUDE}"] = magnitude
        scale = next(_deltas(model, place, name)).scale
        alpha = scale * (math.sqrt(len(a)) if config.rslora else len(a))
        settings[theirs] = len(a), alpha
    whole = {key.removeprefix(bare): value for key, value in written_whole(model, config).items()}
    tensors |= {_PREFIX + theirs: tensor for theirs, tensor in whole.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: memory that a file was written from is no longer FSDP's to free.
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    ranks = {path: len(_delta(layer, name).a) for path, layer in layers.items()}
    told = {_BASE: base_digest(model, config.trained), _RANKS: json.dumps(ranks)}
    write_file(folder / WEIGHTS, tensors, told)
    described = _described(model, config, settings, sorted(whole), base or model.origin)
    with atomic_file(folder / CONFIG) as file:
        file.write((json.dumps(described, indent=2) + "\n").encode())


def load_adapter(
    model: TaskModel, directory: str | Path, name: str = DEFAULT, *, any_base: bool = False
) -> None:
    """Give `model` an adapter that `save_adapter` or PEFT wrote, and use it alone.

    any_base: take one that was trained beside other weights than the model's, if the shapes fit.
    Errors: FileError for a directory without one, for another kind than LoRA, and for one that was
    made for another model; ConfigError for a name that is taken.
    """
    folder = Path(directory)
    if not (folder / CONFIG).is_file():
        raise FileError(f"{folder} holds no adapter: there is no {CONFIG}")
    stated = read_json(folder / CONFIG)
    config = _config(stated, folder)
    tensors, ranks = _tensors(folder)
    names = known_names(model.config, tensors)
    tensors = {now: tensors[name] for now, name in names.items()}
    places: dict[str, list[Place]] = {}
    for place in linear_places(model).values():
        places.setdefault(place.theirs, []).append(place)
    deltas: dict[str, Delta] = {}
    for key in [key for key in tensors if key.endswith(_A)]:
        theirs, named = key.removesuffix(_A), names[key].removesuffix(_A)
        a, b, magnitude = (tensors.pop(theirs + end, None) for end in (_A, _B, _MAGNITUDE))
        if theirs not in places or a is None or b is None:
            raise FileError(
                f"{folder} adapts {named}, which {model.config.model_type} does not have as a "
                "linear layer: it is for another model"
            )
        alpha = _alpha(stated.get("alpha_pattern") or {}, named, config.alpha, folder)
        own = replace(config, rank=len(a), alpha=alpha)
        split = _split(model, places[theirs], a, b, magnitude, own, folder)
        deltas |= _told_apart(split, ranks)
    rules = checkpoint_rules(model.config, model.head_kind)
    if not stated.get("ensure_weight_tying"):
        check_tied(rules, tensors, folder)
    shapes = {
        key.removeprefix("backbone."): value.shape
        for key, value in model.state_dict().items()
        if f".{BESIDE}." not in key
    }
    found = to_ours(rules, tensors, shapes, optional=tuple(shapes))
    parts = sorted({key.rpartition(".")[0] for key in found})
    targets = tuple(sorted(deltas))
    if not any_base:
        check_base(model, folder, parts)
    place_adapter(model, name, replace(config, targets=targets, trained=tuple(parts)), deltas)
    with torch.no_grad():
        own_names = {key.removeprefix("backbone."): p for key, p in model.named_parameters()}
        for key, tensor in found.items():
            parameter = own_names[key]
            # Its storage may be another model's, too.
            parameter.data = tensor.to(parameter, copy=True)


def check_base(model: TaskModel, folder: Path, trained: Sequence[str] = ()) -> None:
    """FileError for an adapter that says that it was trained beside other weights than these.

    trained: the parts of the model that came with it.
    """
    stated = _file(folder).metadata.get(_BASE)
    if stated is not None and stated != base_digest(model, trained):
        base = read_json(folder / CONFIG).get(_BASE_NAME)
        raise FileError(
            f"{folder} was trained beside other weights{f', of {base}' if base else ''}: use that "
            "model, or load_adapter(..., any_base=True)"
        )


def _modules(places: Mapping[str, Place], layers: Mapping[str, Adapted]) -> list[Place]:
    """One place for each module of the checkpoint that holds an adapted layer."""
    found = {places[path].theirs: places[path] for path in layers if path in places}
    return list(found.values())


def _joined(model: TaskModel, place: Place, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and lengths of a module of the checkpoint, whose parts may be several layers here."""
    layers = [model.get_submodule(part) for part in place.parts]
    deltas = [_delta(layer, name) for layer in layers]
    there = list(_deltas(model, place, name))
    first = there[0]
    alike = [d.scale == first.scale and torch.equal(d.a, first.a) for d in there]
    shared = len(there) == len(deltas) and all(alike)
    if shared:
        a, parts = first.a, [delta.b for delta in there]
    else:
        # Side by side, each part reads its own rows of A.
        a = torch.cat([delta.a for delta in there])
        parts, before = [], 0
        for layer, delta in zip(layers, deltas, strict=True):
            wide = a.new_zeros(int(layer.out_features), len(a))  # pyright: ignore[reportArgumentType]
            if delta is not None:
                own = delta.b * (delta.scale / first.scale)
                wide[:, before : before + own.shape[1]] = own
                before += own.shape[1]
            parts.append(wide)
    magnitude = None
    if any(delta.magnitude is not None for delta in there):
        lengths = [
            _weight(layer).norm(dim=1) if delta is None or delta.magnitude is None
            else delta.magnitude
            for layer, delta in zip(layers, deltas, strict=True)
        ]  # fmt: skip
        magnitude = _rows_together([length[:, None] for length in lengths], place.heads)[:, 0]
    return a.detach(), _rows_together(parts, place.heads).detach(), (
        None if magnitude is None else magnitude.detach()
    )  # fmt: skip


def _split(
    model: TaskModel,
    places: list[Place],
    a: Tensor,
    b: Tensor,
    magnitude: Tensor | None,
    config: LoraConfig,
    folder: Path,
) -> dict[str, Delta]:
    """What each layer that the module holds here is given."""
    first = places[0]
    layers: list[Any] = [model.get_submodule(part) for part in first.parts]
    sizes = [int(layer.out_features) for layer in layers]
    if a.shape[1] != layers[0].in_features or len(b) != sum(sizes) or b.shape[1] != len(a):
        raise FileError(
            f"{folder} adapts {first.theirs} from {a.shape[1]} to {len(b)} numbers, and the model "
            f"has {layers[0].in_features} to {sum(sizes)} there: it is for another model"
        )
    rows = _rows_apart(b, sizes, first.heads)
    lengths = [None] * len(rows)
    if magnitude is not None:
        apart = _rows_apart(magnitude.flatten()[:, None], sizes, first.heads)
        lengths = [part[:, 0].clone() for part in apart]
    return {
        path: Delta(a.clone(), part.clone(), config.scale, config.dropout, length)
        for path, part, length in zip(first.parts, rows, lengths, strict=True)
    }


def _told_apart(split: dict[str, Delta], ranks: Mapping[str, int]) -> dict[str, Delta]:
    """The layers of a module as they were when `_joined` put them together."""
    own = {path: ranks[path] for path in split if path in ranks}
    if not own or len(split) == 1:
        return split
    whole = len(next(iter(split.values())).a)
    if sum(own.values()) != whole:  # they had one A
        return {path: split[path] for path in own} if own.keys() != split.keys() else split
    found, before = {}, 0
    for path, rank in own.items():
        delta = split[path]
        a, b = (part.detach() for part in (delta.a, delta.b))
        a, b = a[before : before + rank].clone(), b[:, before : before + rank].clone()
        length = None if delta.magnitude is None else delta.magnitude.detach()
        found[path] = Delta(a, b, delta.scale, delta.rate, length)
        before += rank
    return found


def _rows_together(parts: Sequence[Tensor], heads: int) -> Tensor:
    if heads == 1:
        return torch.cat(list(parts))
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


def _rows_apart(whole: Tensor, sizes: list[int], heads: int) -> list[Tensor]:
    by_head = whole.unflatten(0, (heads, -1)).split([size // heads for size in sizes], dim=1)
    return [part.flatten(0, 1) for part in by_head]


def _delta(layer: Any, name: str) -> Delta | None:
    if not isinstance(layer, Adapted) or name not in layer.adapters:
        return None
    found = layer.adapters[name]
    assert isinstance(found, Delta)
    return found


def _deltas(model: TaskModel, place: Place, name: str) -> Iterator[Delta]:
    """Those of the parts of a module that have any."""
    for part in place.parts:
        if (found := _delta(model.get_submodule(part), name)) is not None:
            yield found


def _weight(layer: Any) -> Tensor:
    return layer.whole() if isinstance(layer, Adapted) else layer.weight


def _prefix_left_out(model: TaskModel) -> str:
    """What names of a backbone begin with in a model with a head, and do not without one."""
    is_bare = model.head_kind in ("none", "embed")
    return model.config.row(model.config.model_type).prefix if is_bare else ""


def _described(
    model: TaskModel,
    config: LoraConfig,
    settings: Mapping[str, tuple[int, float]],
    whole: list[str],
    base: str | None,
) -> dict[str, Any]:
    """adapter_config.json of modules with their ranks and alphas; the most frequent are for all."""
    of_all = list(settings.values())
    usual = max(of_all, key=of_all.count, default=(config.rank, config.alpha))
    others = {theirs: own for theirs, own in settings.items() if own != usual}
    kinds = {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "answer": "QUESTION_ANS"}
    written = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
    kind = written.get(getattr(model.config, "kind", "decoder"))
    task = kinds.get(model.head_kind, kind if model.head_kind == "lm" else None)
    return {
        "peft_type": "LORA",
        "task_type": task,
        _BASE_NAME: base,
        "inference_mode": True,
        "r": usual[0],
        "lora_alpha": usual[1],
        "lora_dropout": config.dropout,
        "target_modules": _targets(model, settings),
        "rank_pattern": {re.escape(theirs): rank for theirs, (rank, _) in others.items()},
        "alpha_pattern": {re.escape(theirs): alpha for theirs, (_, alpha) in others.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "fan_in_fan_out": any(place.transposed for place in linear_places(model).values()),
        "modules_to_save": saved_modules(whole, task),
        "bias": "none",
    }


def _targets(model: TaskModel, adapted: Collection[str]) -> list[str]:
    """The last words of the modules' names where they name no other module, else whole names."""
    words = {theirs.rpartition(".")[2] for theirs in adapted}
    bare = _prefix_left_out(model)
    named = {
        place.theirs.removeprefix(bare)
        for place in linear_places(model).values()
        if place.theirs.rpartition(".")[2] in words
    }
    return sorted(words) if named == set(adapted) else sorted(adapted)


def _config(stated: Mapping[str, Any], folder: Path) -> LoraConfig:
    if stated.get("peft_type") != "LORA":
        raise FileError(f"{folder} is of the kind {stated.get('peft_type')!r}; only LORA is read")
    for key, plain in _NOT_READ.items():
        if stated.get(key, plain) not in (plain, None):
            raise FileError(f"{folder}: {key} = {stated[key]!r} is not supported")
    if (begun := stated.get("init_lora_weights")) not in _BEGINNINGS:
        raise FileError(
            f"{folder}: init_lora_weights = {begun!r} changed the base's weights; save it as a "
            "plain LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    try:
        return LoraConfig(
            rank=int(stated.get("r", 8)),
            alpha=float(stated.get("lora_alpha", 8)),
            dropout=float(stated.get("lora_dropout") or 0.0),
            rslora=bool(stated.get("use_rslora", False)),
            dora=bool(stated.get("use_dora", False)),
        )
    except (TypeError, ValueError) as error:
        raise FileError(f"{folder / CONFIG} has a wrong value: {error}") from None


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Those of the adapter by their names in the model's checkpoint; ranks here, where stated."""
    file = _file(folder)
    try:
        ranks = json.loads(file.metadata.get(_RANKS, "{}"))
        assert all(type(rank) is int and rank > 0 for rank in ranks.values())
    except (ValueError, AttributeError, AssertionError):
        raise FileError(f"{folder / WEIGHTS}: {_RANKS} is not a table of ranks") from None
    return {key.removeprefix(_PREFIX): value for key, value in file.items()}, ranks


def _file(folder: Path) -> SafetensorsFile:
    if not (folder / WEIGHTS).is_file():
        raise FileError(f"{folder} has no {WEIGHTS}; save the adapter as safetensors")
    return SafetensorsFile(folder / WEIGHTS)


def _alpha(patterns: Any, theirs: str, usual: float, folder: Path) -> float:
    """By PEFT's patterns: a key is an expression for the end of a module's name."""
    try:
        for key, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({key})", theirs):
                return float(value)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise FileError(f"{folder / CONFIG}: alpha_pattern has a wrong value: {error}") from None
    return usual
