"""The rungs of the ladder: language models in the order of their invention, sized for a budget.

What each costs is counted by train/flops.py; the n-gram, which counts and does not learn by
gradients, is no rung of this kind.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from polyhead.errors import ConfigError
from polyhead.models.assemble import assemble, build
from polyhead.models.model import TaskModel
from polyhead.models.registry import family_of
from polyhead.train.flops import product_weights, training_flops

TOKENS_A_WEIGHT = 20
"""Tokens that a weight should see (Hoffmann et al. 2022)."""
MOST_EPOCHS = 4
"""How often a text may be read before repeating it is worth less than more weights (Muennighoff et
al. 2023)."""


@dataclass(frozen=True)
class Rung:
    """One kind of model.

    sizes: its config's fields at a width. multiple: of which widths are, up to `widest`. lr: the
    highest learning rate; docs/ladder.md says how it was found.
    """

    name: str
    family: str
    sizes: Callable[[int], Mapping[str, Any]]
    multiple: int
    widest: int
    lr: float


@dataclass(frozen=True)
class Plan:
    """A rung within a budget. weights: that a token is multiplied with."""

    rung: Rung
    fields: Mapping[str, Any]
    width: int
    weights: int
    flops_per_token: float
    steps: int


def _heads(width: int) -> int:
    """Four, or as many of width 64 as there is room for."""
    return width // 64 if width % 64 == 0 and width >= 256 else 4


def _stack(width: int) -> dict[str, Any]:
    """Deeper as it gets wider, a layer for each 32."""
    return {"d_model": width, "num_layers": max(1, width // 32), "num_heads": _heads(width)}


def _gated(width: int) -> int:
    """A gated feed-forward's width, of as many weights as a plain one of 4 E: 8/3 E."""
    return 8 * round(width / 3)


RUNGS = (
    Rung("bigram", "bigram", lambda width: {"d_model": width}, 8, 1 << 16, 1e-3),
    Rung(
        "window-mlp",
        "window_mlp",
        lambda width: {"d_model": width, "embedding_width": width // 8, "window": 16},
        8,
        1 << 14,
        1e-2,
    ),
    Rung("lstm", "lstm", lambda width: {"d_model": width, "num_layers": 2}, 8, 1 << 14, 2e-2),
    Rung("gpt", "gpt2", _stack, 16, 1 << 10, 1e-2),
    Rung(
        "llama", "llama", lambda width: {**_stack(width), "d_ff": _gated(width)}, 16, 1 << 10, 1e-2
    ),
    # Two of eight experts of half the width: a token costs what it costs in Llama.
    Rung(
        "moe",
        "mixtral",
        lambda width: {
            **_stack(width),
            "num_kv_heads": _heads(width),
            "d_ff": _gated(width) // 2,
            "num_experts": 8,
            "top_k": 2,
        },
        16,
        1 << 10,
        1e-2,
    ),
)


def planned(
    rung: Rung, budget: float, vocab_size: int, context: int, batch_size: int, corpus: int
) -> Plan:
    """The width and the steps by which a rung spends a budget of FLOPs.

    The width is the one whose tokens, that is budget / FLOPs a token, come nearest to
    `TOKENS_A_WEIGHT` for each weight or `MOST_EPOCHS` of a corpus of so many tokens, whichever is
    less; the steps then spend the budget to within half a step. ConfigError for a budget that is
    too small or too large for that.
    """

    @cache
    def excess(width: int) -> float:
        """How many times the tokens that the budget buys are those wanted, as a logarithm."""
        weights, flops = _cost(rung, width, vocab_size, context)
        wanted = min(TOKENS_A_WEIGHT * weights, MOST_EPOCHS * corpus)
        return math.log(budget / flops / wanted)

    low = high = rung.multiple
    while excess(high) > 0:
        if high >= rung.widest:
            raise ConfigError(
                f"a budget of {budget:.3g} FLOPs is more than {rung.name} can spend on {corpus:,} "
                "tokens: lower --flops, or give more text"
            )
        low, high = high, min(2 * high, rung.widest)
    while high - low > rung.multiple:
        middle = (low + high) // 2 // rung.multiple * rung.multiple
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    width = min((low, high), key=lambda width: abs(excess(width)))
    weights, flops = _cost(rung, width, vocab_size, context)
    a_step = flops * batch_size * context
    steps = round(budget / a_step)
    if steps < 1:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs is less than a step of the smallest {rung.name}, "
            f"{a_step:.3g}: raise --flops, or lower --context or --batch-size"
        )
    return Plan(rung, _fields(rung, width, vocab_size, context), width, weights, flops, steps)


def built(plan: Plan, seed: int) -> TaskModel:
    """The model of a plan with fresh weights."""
    return build(plan.rung.family, seed=seed, **plan.fields)


def _fields(rung: Rung, width: int, vocab_size: int, context: int) -> dict[str, Any]:
    # Narrow layers begin with larger weights, so that sums begin alike.
    std = 0.5 / math.sqrt(width)
    sizes = {"vocab_size": vocab_size, "max_seq_len": context, "init_std": std}
    return {**sizes, **rung.sizes(width)}


def _cost(rung: Rung, width: int, vocab_size: int, context: int) -> tuple[int, float]:
    """Weights that a token is multiplied with, and FLOPs a token."""
    family = family_of(rung.family)
    config = family.config.fresh(rung.family, **_fields(rung, width, vocab_size, context))
    with torch.device("meta"):
        model = assemble(family, config, "lm")
    return product_weights(model), training_flops(model, context)
