"""A run's log, and a look into its model, as the plain data of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from polyhead.explain.capture import capture
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.blend import prepared_of, texts_of
from polyhead.train.log import read_log, standing
from polyhead.train.prepared import open_prepared
from polyhead.train.report import AttentionMap, Chart, Point

_SHOWN_SAMPLES = 6
_SNIPPET = 48  # characters, or tokens
_CHARTS: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("Gradient", ("grad_norm",), 1.0, "Its length by step, before clipping."),
    ("Learning rate", ("lr",), 1.0, ""),
    ("Zeros", ("sparsity",), 1.0, "The share of the pruned matrices' weights."),
    ("Speed", ("tokens_per_second", "rows_per_second"), 1.0, "Tokens, or rows, a second."),
    ("Memory", ("memory_bytes",), 2.0**-20, "The most so far, in MiB."),
)


def curves_of(run: Path) -> dict[str, list[Point]]:
    """Bits per byte by step, or else the loss, while training and on what is held out."""
    records = standing(read_log(run / "log.jsonl"))
    name = "bits_per_byte" if any("bits_per_byte" in r for r in records) else "loss"
    return {
        "training": [(r["step"], r[name]) for r in records if name in r],
        "held out": [(r["step"], r[f"valid_{name}"]) for r in records if f"valid_{name}" in r],
    }


def charts_of(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """What else the logs of runs hold by step: gradients, learning rates, speed, memory."""
    charts: list[Chart] = []
    for title, keys, scale, caption in _CHARTS:
        curves = {
            name: [
                (r["step"], r[key] * scale) for r in standing(records) for key in keys if key in r
            ]
            for name, records in logs.items()
        }
        charts.append(Chart(title, curves, caption))
    return charts


def samples_of(run: Path) -> list[tuple[int, str]]:
    """A few samples from the first to the last."""
    records = standing(read_log(run / "log.jsonl"))
    found = [(r["step"], r["sample"]) for r in records if "sample" in r]
    if len(found) <= _SHOWN_SAMPLES:
        return found
    last = len(found) - 1
    return [found[round(i * last / (_SHOWN_SAMPLES - 1))] for i in range(_SHOWN_SAMPLES)]


def snippet_of(source: Any, tokenizer: Tokenizer) -> str:
    """The beginning of a corpus, or of the first of several."""
    prepared = prepared_of(source)
    if prepared is None:
        return next(texts_of(source))[:_SNIPPET]
    ids = open_prepared(prepared, tokenizer, tokenizer.vocab_size).ids[:_SNIPPET]
    return tokenizer.decode(ids.tolist())


def attention_of(model: TaskModel, tokenizer: Tokenizer, text: str) -> AttentionMap | None:
    """The head that looks back most pointedly at something else than its own or the last token.

    Of all heads, the one with the largest mean of each row's highest weight two or more tokens
    back. None for a model without attention, or a text too short.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = ids[: getattr(model.config, "max_seq_len", None)]
    if len(ids) < 4:
        return None
    with torch.inference_mode():
        try:
            with capture(model, "*") as seen:
                model(torch.tensor([ids], device=model.device))
        except ValueError:
            return None
    maps = {name: weights[0].float().cpu() for name, weights in seen.items()}
    far = torch.ones(len(ids), len(ids)).tril(-2).bool()

    def pointed(weights: torch.Tensor) -> torch.Tensor:
        return (weights * far).amax(-1)[:, 2:].mean(-1)

    best = max(maps, key=lambda name: float(pointed(maps[name]).max()))
    head = int(pointed(maps[best]).argmax())
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    caption = (
        f"Head {head} of {best}. Each row is a token; the darker a cell, the "
        "more the row looks at that column. Of all heads this one looks back most pointedly: "
        "follow a row to the left and see which earlier token it picks."
    )
    return AttentionMap(tokens, _rounded(maps[best][head].tolist()), caption)


def _rounded(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in rows]


def facts_of(model: TaskModel, figures: dict[str, Any]) -> dict[str, str]:
    """What a reader wants to know of a run at a glance."""
    config = model.config
    facts = {"model": config.model_type, "parameters": f"{model.num_parameters():,}"}
    layers, width = getattr(config, "num_layers", None), getattr(config, "d_model", None)
    if layers and width:
        facts["size"] = f"{layers} layers, {width} wide"
    if "sparsity" in figures:
        facts["zeros"] = f"{figures['sparsity']:.1%}"
    for unit in ("tokens", "rows"):
        if unit in figures:
            facts[f"{unit} seen"] = f"{figures[unit]:,}"
    if "valid_bits_per_byte" in figures:
        facts["held out"] = f"{figures['valid_bits_per_byte']:.3f} bits/byte"
        return facts
    for name, value in figures.items():
        if name.startswith("valid_"):
            facts[name.replace("valid_", "held-out ").replace("_", " ")] = f"{value:.4f}"
    return facts
