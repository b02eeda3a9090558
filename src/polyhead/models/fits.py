"""Whether a value from outside is of a field's type, and that type in words."""

import math
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

_WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type."""
    origin = get_origin(kind) or kind
    if origin in (UnionType, Union):
        return any(fits(value, one) for one in get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple | list) and all(
            fits(one, get_args(kind)[0]) for one in cast("Iterable[Any]", value)
        )
    if origin is Literal:
        return value in get_args(kind)
    if origin is float:
        return fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin)


def in_words(kind: Any) -> str:
    """A field's type as a user reads it."""
    kinds = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    return " or ".join(
        "nothing" if one is NoneType else _WORDS.get(one) or str(one) for one in kinds
    )
