"""RoPE scaling in GGUF metadata and in a Hugging Face config.json.

Linear and YaRN are keys; Llama 3.1's is a tensor, rope_freqs.weight, from which the four numbers of
a config.json are found again.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError

ROPE_KEYS = frozenset(
    """type factor original_context_length attn_factor yarn_beta_fast yarn_beta_slow yarn_ext_factor
    yarn_attn_factor""".split()
)


def scaling_from_metadata(
    given: Mapping[str, Any], config: Mapping[str, Any], freqs: Tensor | None
) -> dict[str, Any] | None:
    """A config's rope_scaling from the architecture's keys, and from rope_freqs.weight if any."""
    kind = given.get("rope.scaling.type", "none")
    factor = plain("rope.scaling.factor", given.get("rope.scaling.factor", 1.0))
    if "rope.scale_linear" in given and kind == "none":
        kind, factor = "linear", plain("rope.scale_linear", given["rope.scale_linear"])
    if freqs is not None:
        return _llama3_from_factors(freqs, config["rope_theta"])
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ConfigError(f"rope.scaling.type = {kind!r} is not read here (known: linear, yarn)")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    length = given.get("rope.scaling.original_context_length")
    scaling["original_max_position_embeddings"] = length or config["max_position_embeddings"]
    attention = plain("attn_factor", given.get("rope.scaling.attn_factor", 1.0))
    if attention != 1.0:
        scaling["attention_factor"] = attention * _yarn_attention(factor)
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"rope.scaling.{key}" in given:
            scaling[name] = plain(key, given[f"rope.scaling.{key}"])
    for key in ("yarn_ext_factor", "yarn_attn_factor"):
        if given.get(f"rope.scaling.{key}", 1.0) != 1.0:
            raise ConfigError(
                f"rope.scaling.{key} = {given[f'rope.scaling.{key}']} is not read here"
            )
    return scaling


def metadata_from_rope(config: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The architecture's keys for a config's RoPE, and rope_freqs.weight if it needs one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    metadata: dict[str, Any] = {"rope.freq_base": theta}
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise ConfigError("a partial_rotary_factor cannot be written as GGUF here")
    if kind == "default":
        return metadata, None
    factor = float(rope.pop("factor", 1.0))
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        length = rope["original_max_position_embeddings"]
        return metadata, llama3_factors(theta, config["head_dim"], factor, low, high, length)
    metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        length = rope.pop("original_max_position_embeddings", None)
        metadata["rope.scaling.original_context_length"] = (
            length or config["max_position_embeddings"]
        )
        attention = rope.pop("attention_factor", None)
        if attention is not None:
            metadata["rope.scaling.attn_factor"] = float(attention) / _yarn_attention(factor)
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                metadata[f"rope.scaling.yarn_{name}"] = float(rope.pop(name))
    left = {name: value for name, value in rope.items() if value is not None}
    if kind not in ("linear", "yarn") or left:
        raise ConfigError(f"RoPE scaling {kind!r} with {left} cannot be written as GGUF here")
    return metadata, None


def llama3_factors(
    theta: float, dim: int, factor: float, low: float, high: float, length: float
) -> Tensor:
    """What Llama 3.1 divides each rotary frequency by, fp32 [dim / 2] (rope_freqs.weight)."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    wavelengths = 2 * math.pi / freqs
    smooth = (length / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > length / low, torch.full_like(freqs, factor), between)
    return torch.where(wavelengths < length / high, torch.ones_like(freqs), factors)


def _llama3_from_factors(freqs: Tensor, theta: float) -> dict[str, Any]:
    """The parameters behind rope_freqs.weight, proved by computing the factors from them again.

    Between the two cut-offs 1/f is linear in the frequency; its line gives both cut-offs. Only
    their ratios to the length are fixed, so the low factor is taken as 1, as Meta has it. Where
    fewer than two frequencies lie between, Meta's own values are tried.
    """
    factors = freqs.double()
    dim, factor = 2 * len(factors), _tidy(factors.max().item())
    candidates = [(f, 1.0, 4.0, 8192.0) for f in (factor, 8.0, 32.0)]
    between = (factors > 1.0 + 1e-6) & (factors < factor - 1e-6)
    if factor > 1 and between.sum() >= 2:
        waves = 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        x, y = (1 / waves)[between], smooth[between]
        slope = ((y[0] - y[-1]) / (x[0] - x[-1])).item()
        shift = (y[0] - slope * x[0]).item()
        if shift < 0:
            candidates.append((factor, 1.0, _tidy(1 - 1 / shift), float(round(-slope / shift))))
    for candidate in candidates:
        again = llama3_factors(theta, dim, *candidate)
        if torch.allclose(again, freqs.float(), rtol=1e-4, atol=0):
            names = ("factor", "low_freq_factor", "high_freq_factor")
            scaling = dict(zip(names, candidate, strict=False))
            length = int(candidate[3])
            return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": length}
    raise ConfigError(
        "rope_freqs.weight holds factors that no Llama 3 scaling gives; not read here"
    )


def _yarn_attention(factor: float) -> float:
    """YaRN's own attention factor (arXiv 2309.00071, eq. 22), which attn_factor multiplies."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _tidy(value: float) -> float:
    return round(value, 3) if abs(value - round(value, 3)) < 1e-3 else value


def plain(key: str, value: Any) -> Any:
    """A number as a config has it: floats in their shortest fp32 spelling, equal lists as one.

    Errors: ConfigError for what is no number, not finite, or differs from layer to layer.
    """
    if isinstance(value, list):
        if not value or any(item != value[0] for item in value):
            raise ConfigError(f"{key} differs from layer to layer, which is not read here")
        value = value[0]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"{key} = {str(value)[:60]!r} is not a number")
    return float(str(np.float32(value))) if isinstance(value, float) else value
