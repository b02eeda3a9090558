"""How alike the states of layers are. n tokens, E widths."""

from collections.abc import Mapping

import torch
from torch import Tensor


def cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of `[n, E]` and `[n, E']`: 0 to 1 (Kornblith et al. 2019).

    1 where the states differ by a turn and a scale alone.
    """
    x, y = (z.double() - z.double().mean(0) for z in (one, other))
    if len(x) < max(x.shape[1], y.shape[1]):
        # By the tokens' products, where tokens are fewer.
        a, b = x @ x.T, y @ y.T
        cross, own = (a * b).sum(), a.norm() * b.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross / own) if own > 0 else 0.0


def layer_similarity(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None, keep: Tensor | None = None
) -> Tensor:
    """`cka` of each layer's states with each of another model's, or its own: `[L, L']`.

    one, other: what `capture(model, what="residual")` gave of the same texts, `[B, T, E]` a layer.
    keep: `[B, T]` true where a token counts.
    """
    mine, theirs = (_tokens(states, keep) for states in (one, one if other is None else other))
    return torch.tensor([[cka(x, y) for y in theirs] for x in mine])


def _tokens(states: Mapping[str, Tensor], keep: Tensor | None) -> list[Tensor]:
    return [
        state.flatten(0, 1) if keep is None else state[keep.bool()] for state in states.values()
    ]
