"""Configs within a config: the towers of a model, each under a key of the whole's `config.json`."""

from collections.abc import Mapping
from typing import Any, TypeVar

from polyhead.models.config import JSON, Config
from polyhead.models.config_json import from_hf, to_hf

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
