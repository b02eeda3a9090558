"""Adapters of a model: added, used, mixed, merged into its weights, and taken away again."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polyhead.adapt.lora import Adapted, Delta, LoraConfig, adapted, adapted_layers, fresh
from polyhead.adapt.names import chosen
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel

DEFAULT = "default"


def add_adapter(model: TaskModel, config: LoraConfig | None = None, name: str = DEFAULT) -> None:
    """Give `model` a fresh adapter and use it alone; all else stops learning, but for the parts
    that `config.trained` names and those that the model's checkpoint lacked.

    The model answers as before until the adapter has learned. Errors: ConfigError for a target that
    names no layer, a part to train that is not there, and a name that is taken.
    """
    config = config or LoraConfig()
    config = replace(config, trained=(*config.trained, *model.drawn))
    places = chosen(model, config.targets)
    deltas = {place: fresh(adapted(model.get_submodule(place)), config) for place in places}
    place_adapter(model, name, config, deltas)


def place_adapter(
    model: TaskModel, name: str, config: LoraConfig, deltas: Mapping[str, Delta]
) -> None:
    """Put what an adapter is made of beside the layers, by their names, and use it alone."""
    _check_name(name)
    if name in adapters_of(model):
        raise ConfigError(f"the model has an adapter {name!r} already; choose another name")
    parts = [part for _, part in trained_parts(model, config.trained)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, delta in deltas.items():
        layer = adapted(model.get_submodule(path))
        model.set_submodule(path, layer)
        layer.adapters[name] = delta.to(model.device, model.dtype).train(layer.training)
    for part in parts:
        part.requires_grad_(True)
    _configs(model)[name] = config
    use_adapters(model, name)


def use_adapters(model: TaskModel, names: str | Mapping[str, float] | None) -> None:
    """Answer with an adapter, a mixture of some (name: how much each counts), or none (None).

    Of the adapters only those in use learn.
    Errors: ConfigError for a name that is not there, for DoRA in a mixture, and while adapters are
    merged.
    """
    shares = {names: 1.0} if isinstance(names, str) else dict(names or {})
    known = adapters_of(model)
    for name, share in shares.items():
        if name not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ConfigError(f"the model has no adapter {name!r}; there is {there}")
        if known[name].dora and (share != 1.0 or len(shares) > 1):
            raise ConfigError(f"{name!r} is a DoRA, which counts in full and alone; merge it first")
    layers = _unmerged_layers(model)
    for layer in layers:
        layer.shares = dict(shares)
        for name, delta in layer.adapters.items():
            delta.requires_grad_(name in shares)


def in_use(model: nn.Module) -> dict[str, float]:
    """The adapters that the model answers with, and how much each counts."""
    return next((dict(layer.shares) for _, layer in adapted_layers(model)), {})


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """Answers of the model as it was, for as long as this is entered; what learns stays as it is.

    Errors: ConfigError while adapters are merged.
    """
    layers = _unmerged_layers(model)
    before = [layer.shares for layer in layers]
    for layer in layers:
        layer.shares = {}
    try:
        yield
    finally:
        for layer, shares in zip(layers, before, strict=True):
            layer.shares = shares


def merge_adapters(model: TaskModel, keep: bool = True) -> None:
    """Make the adapters in use part of the weights: the same answers at the plain model's speed.

    keep: hold the old weights, so that `unmerge_adapters` restores them bit for bit; without, every
    adapter goes, and the model is a plain one again.
    Errors: ConfigError for a layer whose weights are kept in few bits.
    """
    for name, layer in adapted_layers(model):
        weight = layer.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ConfigError(f"{name} is kept in few bits; merge into a model loaded as floats")
        if layer.merged is None and (changed := _changed(layer)) is not None:
            # The storage of the old weight may be another model's, too.
            layer.merged, weight.data = weight.detach(), changed.to(weight)
    if not keep:
        remove_adapters(model)


def unmerge_adapters(model: TaskModel) -> None:
    """The weights as they were before `merge_adapters`, bit for bit."""
    for _, layer in adapted_layers(model):
        if layer.merged is not None:
            layer.weight.data = layer.merged
            layer.merged = None


def remove_adapters(model: TaskModel) -> None:
    """Take every adapter away; what is merged stays in the weights, and everything learns again."""
    for name, layer in list(adapted_layers(model)):
        plain: Any = type(layer).__mro__[2]
        found = plain.__new__(plain)
        found.__dict__ = layer.__dict__
        for attribute in ("shares", "merged"):
            found.__dict__.pop(attribute)
        del found._modules["adapters"]
        model.set_submodule(name, found)
    _configs(model).clear()
    model.requires_grad_(True)


def adapters_of(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters of a model, by name."""
    return dict(_configs(model))


def _changed(layer: Adapted) -> torch.Tensor | None:
    """The weight with the adapters in use; None where none of them changes this layer."""
    some = [(layer.adapters[name], share) for name, share in layer.shares.items()
            if name in layer.adapters]  # fmt: skip
    found = layer.whole() if some else None
    for delta, share in some:
        found = delta.merged(found, share)
    return found


def _unmerged_layers(model: nn.Module) -> list[Adapted]:
    """The layers that have adapters; ConfigError while any are merged."""
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.merged is not None for layer in layers):
        raise ConfigError("adapters are merged into the weights; unmerge them first")
    return layers


def trained_parts(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The parts of a model that names, or their ends, name, with those tied to them; ConfigError
    where one names none."""
    found: list[tuple[str, nn.Module]] = []
    for name in names:
        some = [
            (path, part)
            for path, part in model.named_modules()
            if path.removeprefix("backbone.") == name or path.endswith(f".{name}") or path == name
        ]
        if not some:
            raise ConfigError(f"the model has no part {name!r} to train; name one as it is called")
        found += some
    moved = {id(weight) for _, part in found for weight in part.parameters()}
    there = {path for path, _ in found}
    for path, part in model.named_modules():
        own = part.parameters(recurse=False)
        inside = any(path.startswith(f"{other}.") for other in there)
        if path not in there and not inside and any(id(weight) in moved for weight in own):
            found.append((path, part))
    return found


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Kept with the model, as it is with it that they make sense."""
    return model.__dict__.setdefault("adapter_configs", {})


def _check_name(name: str) -> None:
    if not name or "." in name or "/" in name:
        raise ConfigError(f"an adapter cannot be called {name!r}; use letters and digits")
