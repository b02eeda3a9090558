"""What looks into attention from outside, and may change what it sees."""

from collections.abc import Sequence

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

    def found(part: slice, allowed: Tensor | None, own: Tensor | None) -> Tensor:
        seen = _weights(q[:, :, part], k, own, allowed, scale, probes)
        heads = (dropout(seen, rate) if rate else seen) @ v
        if position is not None and position.has_values:
            heads = heads + position.values(seen, at[:, part], keys_at)
        return heads

    num_queries, num_keys = q.shape[2], k.shape[2]
    step = _step(num_queries, probes)
    if step is None:
        return found(slice(None), mask.boolean(num_queries, num_keys, q.device), bias)
    # Written where they belong: small answers kept between large ones would scatter the memory.
    heads = q.new_empty(*q.shape[:3], v.shape[-1])
    for begin in range(0, num_queries, step):
        part = slice(begin, min(begin + step, num_queries))
        allowed = mask.rows(part.start, part.stop, num_keys, q.device)
        own = bias if bias is None or bias.shape[-2] == 1 else bias[..., part, :]
        heads[:, :, part] = found(part, allowed, own)
    return heads


def _step(num_queries: int, probes: Sequence[Probe]) -> int | None:
    """How many queries are looked at together; None: all of them."""
    asked = [probe.queries_at_once for probe in probes if probe.needs_weights]
    steps = [step for step in asked if step is not None]
    if len(steps) < len(asked) or not steps or min(steps) >= num_queries:
        return None
    return min(steps)


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
