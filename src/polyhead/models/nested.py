"""Models within a model: each tower's config under a key of the whole's, its tensors under a name.

The registry is asked for the families of towers; it lists those of the whole, so not before.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from polyhead.models.config import JSON, Config
from polyhead.models.config_json import from_hf, to_hf
from polyhead.models.keys import Dropped, Rule, Rules, Tied

C = TypeVar("C", bound=Config)


def read_part(cls: type[C], model_type: str, found: JSON | None) -> C:
    """A tower's config from what stands under its key; null leaves all to the type's defaults."""
    return from_hf(cls, {**(found or {}), "model_type": model_type})


def write_part(config: Config) -> dict[str, Any]:
    """What stands under a tower's key: its `config.json`, without a class of its own."""
    data = to_hf(config)
    if "architectures" not in config.source:
        del data["architectures"]
    return data


def made_part(cls: type[C], model_type: str, value: C | Mapping[str, Any]) -> C:
    """A tower's config as it is, or from its fields."""
    return cls.fresh(model_type, **value) if isinstance(value, Mapping) else value


def class_of(model_type: Any) -> type[Config]:
    """The class of a type's configs; raises ConfigError for one that is not known."""
    from polyhead.models.registry import family_of

    return family_of(str(model_type)).config


def part_backbone(config: Config) -> nn.Module:
    """A fresh backbone of the config's family."""
    from polyhead.models.registry import family_of

    return family_of(config.model_type).backbone(config)


def part_rules(config: Config, ours: str, theirs: str) -> Rules:
    """The checkpoint map of a part that is called `ours` here and stands under `theirs` there.

    Its pooler is `ours` with `_pooler`.
    """
    from polyhead.models.registry import family_of

    family = family_of(config.model_type)
    prefix = family.row(config.model_type).prefix
    return [_moved(rule, ours, prefix, theirs) for rule in family.rules(config)]


def _moved(
    rule: Rule | Dropped | Tied, ours: str, prefix: str, theirs: str
) -> Rule | Dropped | Tied:
    there = theirs + rule.theirs.removeprefix(prefix)
    if isinstance(rule, Rule):
        return replace(rule, theirs=there, ours=_within(rule.ours, ours))
    if isinstance(rule, Tied):
        return replace(rule, theirs=there, same_as=theirs + rule.same_as.removeprefix(prefix))
    return replace(rule, theirs=there)


def _within(names: str | tuple[str, ...], part: str) -> str | tuple[str, ...]:
    if isinstance(names, tuple):
        return tuple(str(_within(name, part)) for name in names)
    return f"{part}_{names}" if names.startswith("pooler.") else f"{part}.{names}"
