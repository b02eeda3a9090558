"""What looks into attention from outside, and may change what it sees."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.nn.attend import expand_heads, scores, shares
from polyhead.nn.dropout import dropout
from polyhead.nn.mask import Lowered
from polyhead.nn.position import Position


class Probe:
    """One who sees what an attention layer computes; what a method returns is used from there on.

    needs_weights:   the layer must compute scores and weights, off the fused path.
    queries_at_once: of so many queries at a time or fewer; None: it must see those of all at once.
    """

    needs_weights = True
    queries_at_once: int | None = None

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, Q, D]`, keys and values `[B, G, K, D]`, as they meet: normed, turned."""
        return q, k, v

    def scores(self, scores: Tensor) -> Tensor:
        """Scaled and biased, `[B, H, Q, K]` fp32, minus infinity where a query may not look."""
        return scores

    def weights(self, weights: Tensor) -> Tensor:
        """Their softmax `[B, H, Q, K]`."""
        return weights

    def heads(self, heads: Tensor) -> Tensor:
        """What each head found `[B, H, Q, D]`."""
        return heads


def attend_seen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lowered,
    bias: Tensor | None,
    scale: float,
    rate: float,
    probes: Sequence[Probe],
    position: Position | None,
    at: Tensor,
    keys_at: Tensor,
) -> Tensor:
    """`attend` by its definition, as the probes leave it; `[B, H, Q, D]`. rate: of dropout."""
    sharing = len(q) // len(k)
    if sharing > 1:
        # One memory serves several rows, as that of one text does its beams.
        k, v = k.repeat_interleave(sharing, 0), v.repeat_interleave(sharing, 0)
        mask = mask.repeated(sharing)
    v = expand_heads(v, q.shape[1])
    parts: list[Tensor] = []
    for part, allowed, own in _parts(q, k, mask, bias, probes):
        seen = _weights(q[:, :, part], k, own, allowed, scale, probes)
        seen = dropout(seen, rate) if rate else seen
        found = seen @ v
        if position is not None and position.has_values:
            found = found + position.values(seen, at[:, part], keys_at)
        parts.append(found)
    return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


def _parts(
    q: Tensor, k: Tensor, mask: Lowered, bias: Tensor | None, probes: Sequence[Probe]
) -> list[tuple[slice, Tensor | None, Tensor | None]]:
    """Queries that are looked at together, with their rows of the mask and of the bias."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    asked = [probe.queries_at_once for probe in probes if probe.needs_weights]
    steps = [step for step in asked if step is not None]
    if len(steps) < len(asked) or not steps or min(steps) >= num_queries:
        return [(slice(None), mask.boolean(num_queries, num_keys, q.device), bias)]
    parts: list[tuple[slice, Tensor | None, Tensor | None]] = []
    for begin in range(0, num_queries, min(steps)):
        part = slice(begin, min(begin + min(steps), num_queries))
        own = bias if bias is None or bias.shape[-2] == 1 else bias[..., part, :]
        parts.append((part, mask.rows(part.start, part.stop, num_keys, q.device), own))
    return parts


def _weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    scale: float,
    probes: Sequence[Probe],
) -> Tensor:
    seen = scores(q, k, bias, scale)
    if probes and allowed is not None:
        seen = seen.masked_fill(~allowed, float("-inf"))
    for probe in probes:
        seen = probe.scores(seen)
    seen = shares(seen, allowed).to(q.dtype)
    for probe in probes:
        seen = probe.weights(seen)
    return seen
