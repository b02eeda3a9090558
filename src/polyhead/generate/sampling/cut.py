"""Where the best tokens of a row end that come to some weight. `N` rows, `V` tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

_BUCKETS = 4096
_REACH = 32.0  # what is further below the best has no weight to speak of: exp(-32) × V


class Cut(NamedTuple):
    """What stays of each row, `[N, 1]` each: scores above `last`, and of those at it the first."""

    last: Tensor
    staying: Tensor
    tied: Tensor


def cut(scores: Tensor, weights: Tensor, limit: Tensor) -> Cut:
    """The best of scores `[N, V]` stay while the weights of those before them are below a limit.

    weights `[N, V]` in float64, limit `[N, 1]` above 0. Where a row is long it is not sorted: steps
    of the score are weighed, and only the step at the limit is looked into.
    """
    # Elsewhere sorting is fast, and adding into buckets adds in any order.
    if scores.device.type != "cpu" or scores.shape[1] <= _BUCKETS:
        return cut_sorted(scores, weights, limit)
    bucket = _buckets(scores)
    each = weights.new_zeros(len(scores), _BUCKETS).scatter_add_(1, bucket, weights)
    reached = each.cumsum(1)
    limit = limit.minimum(reached[:, -1:])
    border = (reached < limit).count_nonzero(1)[:, None]
    limit = limit - (reached - each).gather(1, border)
    row, token = (bucket == border).nonzero(as_tuple=True)
    count = torch.bincount(row, minlength=len(scores))
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    few = scores.new_full((len(scores), int(count.max())), -torch.inf)
    few[row, place] = scores[row, token]
    light = weights.new_zeros(few.shape)
    light[row, place] = weights[row, token]
    return cut_sorted(few, light, limit, count[:, None])


def cut_sorted(scores: Tensor, weights: Tensor, limit: Tensor, count: Tensor | None = None) -> Cut:
    """The same by sorting rows, of which only `count` `[N, 1]` entries are real, if not all."""
    descending, order = scores.sort(dim=1, descending=True, stable=True)
    weights = weights.gather(1, order)
    before = weights.cumsum(1) - weights
    staying = (before < limit).count_nonzero(1)[:, None].clamp(min=1)
    real = torch.full_like(staying, scores.shape[1]) if count is None else count
    staying = staying.minimum(real)
    last = descending.gather(1, staying - 1)
    above = (descending > last).count_nonzero(1)[:, None]
    until = (descending >= last).count_nonzero(1)[:, None].minimum(real)
    return Cut(last, staying - above, until - above)


def _buckets(scores: Tensor) -> Tensor:
    """Which of even steps `[N, V]` from the best down to the least, or to what has no weight."""
    best, least = scores.amax(1, keepdim=True), scores.amin(1, keepdim=True)
    steps = _BUCKETS / (best - least).clamp(max=_REACH)
    below = (best - scores).mul_(steps).nan_to_num_(0.0)
    return below.clamp_(0, _BUCKETS - 1).long()
