"""Fields of a config from the command line: `name=value`, typed by the config."""

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from polyhead.errors import ConfigError


def config_fields(config: type[Any]) -> dict[str, Any]:
    """The fields that may be set, with their types."""
    hints = get_type_hints(config)
    return {
        item.name: hints[item.name]
        for item in dataclasses.fields(config)
        if item.name not in ("model_type", "source")
    }


def parse_fields(config: type[Any], settings: Sequence[str]) -> dict[str, Any]:
    """Values by name of `name=value` words. Errors: ConfigError for what is no field or value."""
    known = config_fields(config)
    values: dict[str, Any] = {}
    for word in settings:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is no setting; write name=value, as in d_model=128")
        if name not in known:
            raise ConfigError(f"there is no field {name!r}; there are {', '.join(sorted(known))}")
        values[name] = _value(known[name], name, text)
    return values


def _value(kind: Any, name: str, text: str) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for one in kinds:
        parsed = _one(one, text)
        if parsed is not _NOT:
            return parsed
    wanted = " or ".join(getattr(one, "__name__", str(one)) for one in kinds)
    raise ConfigError(f"{name} is {text!r}; it must be {wanted.replace('NoneType', 'none')}")


_NOT = object()
_WORDS = {
    bool: {"true": True, "false": False, "yes": True, "no": False},
    types.NoneType: {"none": None, "null": None},
}


def _one(kind: Any, text: str) -> Any:
    """`text` as a value of this type, or _NOT."""
    if kind in _WORDS:
        return _WORDS[kind].get(text.lower(), _NOT)
    origin = get_origin(kind) or kind
    if origin is tuple:
        return tuple(text.split(","))
    try:
        if origin is Mapping:
            value = json.loads(text)
            return value if isinstance(value, dict) else _NOT
        if kind in (int, float):
            return kind(text)
    except ValueError:
        return _NOT
    # "none" is for the type after it, where there is one.
    return text if kind is str and text.lower() != "none" else _NOT
