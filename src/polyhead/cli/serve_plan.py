"""`polyhead serve --dry-run`: what would be served, and the memory that it would take."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyhead.cli.info import BYTES, figures, stored
from polyhead.cli.meta import of_checkpoint
from polyhead.cli.texts import print_table
from polyhead.serve.config import ServeConfig
from polyhead.serve.opening import Opening, device_named

if TYPE_CHECKING:
    from polyhead.cli.meta import Outline

_QUANTIZED = {"int8": 1.0, "int4": 0.5}
_PER_GROUP = {"int8": 0.01, "int4": 0.06}  # scales, to a weight


def show(models: Mapping[str, str], settings: ServeConfig, opening: Opening, as_json: bool) -> int:
    """Print the plan. 1 where it would not fit into the memory that is free."""
    rows = [planned(name, source, settings, opening) for name, source in models.items()]
    total = sum(row["weight_bytes"] + row["cache_bytes"] for row in rows)
    from polyhead.explain.room import free_bytes

    free = free_bytes(device_named(opening.device))
    fits = free is None or total <= free
    if as_json:
        told = {"models": rows, "bytes": total, "free_bytes": free, "fits": fits}
        print(json.dumps({**told, "host": settings.host, "port": settings.port}))
        return 0 if fits else 1
    print_table(
        ("model", "kind", "parameters", "weights", "keys and values"),
        [
            (row["model"], row["kind"], f"{row['parameters']:,}", _sized(row["weight_bytes"]),
             f"{_sized(row['cache_bytes'])} for {row['cache_tokens']:,} tokens"
             if row["cache_tokens"] else "-")
            for row in rows
        ],
    )  # fmt: skip
    room = "" if free is None else f"; {_sized(free)} are free"
    print(f"{_sized(total)} in all, beside the process itself{room}")
    print(
        f"{settings.host}:{settings.port}, {settings.max_rows} texts side by side, "
        f"{settings.max_waiting} requests waiting, keys from {settings.keys or 'nobody'}"
    )
    if not fits:
        print("it does not fit: --quantize int4, fewer --max-rows or --cache-tokens take less")
    return 0 if fits else 1


def planned(name: str, source: str, settings: ServeConfig, opening: Opening) -> dict[str, Any]:
    """One model: what its weights take, and what is held of texts."""
    from polyhead.generate.engine_config import EngineConfig
    from polyhead.tasks.fit import kind_of

    seen = of_checkpoint(source)
    found, kind = figures(seen.model), kind_of(seen.model)
    size, tokens = _bytes_of_a_value(seen, opening), 0
    if kind in ("decoder", "image-text") and seen.model.head_kind == "lm":
        engine = EngineConfig(max_rows=settings.max_rows, cache_tokens=settings.cache_tokens)
        tokens = engine.tokens(getattr(seen.model.config, "max_seq_len", None))
    weights = round(found["parameters"] * size)
    if opening.quantize is not None:
        part = _QUANTIZED[opening.quantize] + _PER_GROUP[opening.quantize]
        weights = round(found["parameters"] * part)
    elif seen.path is not None and _is_in_few_bits(seen, opening):
        weights = stored(seen.path)
    return {
        "model": name, "kind": kind, "parameters": found["parameters"], "weight_bytes": weights,
        "cache_tokens": tokens,
        "cache_bytes": round(tokens * found["kv_cache_values_per_token"] * size),
    }  # fmt: skip


def _bytes_of_a_value(seen: "Outline", opening: Opening) -> float:
    """Of weights as they are loaded: float16, for which CPUs have no fast path, becomes float32."""
    if opening.dtype != "auto":
        return BYTES["float32" if opening.dtype == "float32" else "bfloat16"]
    source = seen.model.config.source
    said = str(source.get("dtype") or source.get("torch_dtype") or "float32")
    return BYTES["bfloat16" if said == "bfloat16" else "float32"]


def _is_in_few_bits(seen: "Outline", opening: Opening) -> bool:
    """Whether weights are kept as they are stored."""
    is_gguf = seen.path is not None and seen.path.suffix == ".gguf" and opening.dtype == "auto"
    return is_gguf or "quantization_config" in seen.model.config.source


def _sized(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1024
    return f"{count:,.2f} GiB"
