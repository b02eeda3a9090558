"""Linear layers of a model by their names, here and in the checkpoint."""

from dataclasses import dataclass

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.keys import Rule
from polyhead.models.model import TaskModel, checkpoint_rules
from polyhead.models.places import place_of
from polyhead.nn.head import LanguageHead


@dataclass(frozen=True)
class Place:
    """A layer, and the module of the checkpoint that holds it: part `part` of `parts` of it.

    name: here, as `get_submodule` takes it; theirs: the module's name there. heads: as in `Rule`.
    """

    name: str
    theirs: str
    part: int
    parts: tuple[str, ...]
    heads: int
    transposed: bool


def linear_places(model: TaskModel) -> dict[str, Place]:
    """Every linear layer that the checkpoint knows, by its name here; no language head."""
    rules = checkpoint_rules(model.config, model.head_kind)
    found: dict[str, Place] = {}
    for name, layer in model.named_modules():
        if not _is_linear(layer) or isinstance(layer, LanguageHead):
            continue
        own = name.removeprefix("backbone.")
        place = place_of(rules, f"{own}.weight")
        if place is None or place[0].reshape:
            continue
        rule, part, theirs = place
        found[name] = Place(
            name, theirs.removesuffix(".weight"), part, _beside(rule, part, name), rule.heads,
            rule.transpose,
        )  # fmt: skip
    return found


def chosen(model: TaskModel, targets: str | tuple[str, ...]) -> dict[str, Place]:
    """The layers that targets name; ConfigError for a target that names none."""
    places = linear_places(model)
    if targets == "all-linear":
        return {name: place for name, place in places.items() if name.startswith("backbone.")}
    found: dict[str, Place] = {}
    for target in targets:
        some = {
            name: place
            for name, place in places.items()
            if _ends(name, target) or _ends(place.theirs, target)
        }
        if not some:
            raise ConfigError(
                f"no linear layer of {model.config.model_type} is called {target!r}; there are "
                f"{', '.join(sorted(_kinds(places)))}"
            )
        found.update(some)
    return {name: place for name, place in places.items() if name in found}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _kinds(places: dict[str, Place]) -> set[str]:
    """The last two words of each name."""
    return {".".join(name.split(".")[-2:]) for name in places}


def _beside(rule: Rule, part: int, name: str) -> tuple[str, ...]:
    """The names of all parts of the module that holds this one."""
    if isinstance(rule.ours, str):
        return (name,)
    endings = [ours.removesuffix(".weight").rpartition(".")[2] for ours in rule.ours]
    stem = name.removesuffix(endings[part])
    return tuple(stem + ending for ending in endings)


def _is_linear(layer: nn.Module) -> bool:
    """Whatever it is kept as."""
    return hasattr(layer, "in_features") and hasattr(layer, "out_features")
