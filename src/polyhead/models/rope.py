"""Rotary positions as `config.json` describes them: version 4's keys and version 5's."""

import math
from collections.abc import Mapping
from typing import Any

from polyhead.errors import ConfigError
from polyhead.nn.rope_scaling import DynamicNTK, Linear, Llama3, Scaling, Yarn, yarn_magnitude
from polyhead.nn.rotary import DynamicRotary, Rotary

KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
        "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned",
    },
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
}  # fmt: skip
"""What each kind of scaling reads; anything else could change the numbers."""


def read_scaling(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The scaling of `rope_parameters` or `rope_scaling`, None where it is the plain kind."""
    if not found:
        return None
    values = {key: value for key, value in found.items() if value is not None}
    values.pop("rope_theta", None)
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if not isinstance(kind, str) or kind not in KEYS:
        raise ConfigError(f"rope scaling {kind!r} is not one of {', '.join(KEYS)}")
    if values.get("partial_rotary_factor") == 1.0:
        del values["partial_rotary_factor"]
    for key in values.keys() - KEYS[kind]:
        # Plain rotary ignores what belongs to the scaled kinds, as transformers does.
        if kind != "default" or key == "partial_rotary_factor":
            raise ConfigError(f"rope scaling {kind!r} has {key!r}, which nothing here reads")
    return None if kind == "default" else {"rope_type": kind, **values}


def make_rotary(
    head_dim: int, base: float, scaling: Mapping[str, Any] | None, max_seq_len: int
) -> Rotary:
    """The part for a base and what `read_scaling` gave; raises ConfigError if keys are missing."""
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}; rotary positions need an even number")
    if base <= 0:
        raise ConfigError(f"the base of the rotary positions is {base}; it must be above 0")
    if scaling is None:
        return Rotary(head_dim, base)
    if scaling["rope_type"] == "dynamic":
        return DynamicRotary(head_dim, base, DynamicNTK(_number(scaling, "factor"), max_seq_len))
    return Rotary(head_dim, base, _static_scaling(scaling, max_seq_len))


def _static_scaling(scaling: Mapping[str, Any], max_seq_len: int) -> Scaling:
    trained_len = int(_number(scaling, "original_max_position_embeddings", max_seq_len))
    kind = scaling["rope_type"]
    if kind == "linear":
        return Linear(_number(scaling, "factor"))
    if kind == "llama3":
        low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
        return Llama3(_number(scaling, "factor"), low, high, trained_len)
    factor = _number(scaling, "factor", max_seq_len / trained_len)
    return Yarn(
        factor,
        trained_len,
        magnitude=_yarn_magnitude(scaling, factor),
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        truncate=bool(scaling.get("truncate", True)),
    )


def _yarn_magnitude(scaling: Mapping[str, Any], factor: float) -> float:
    if "attention_factor" in scaling:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        mscale, all_dim = (_number(scaling, key) for key in ("mscale", "mscale_all_dim"))
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return yarn_magnitude(factor)


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key, default)
    if value is None:
        raise ConfigError(f"rope scaling {scaling['rope_type']!r} needs {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"rope scaling has {key!r}: {value!r}; it must be a number above 0")
    return float(value)
