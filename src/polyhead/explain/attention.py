"""Looks into attention: its queries, keys, values, scores, weights and what its heads find."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from polyhead.explain.look import Look
from polyhead.explain.reduce import Gathered, Reduction
from polyhead.explain.room import require_room
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.probe import Probe

STAGES = ("weights", "scores", "queries", "keys", "values", "heads")
_AT_ONCE = 2**17  # numbers, of which a few copies stay in a cache
_FEWEST = 16  # queries, however long a text is
_LITTLE = 2**26  # numbers that are made unasked


def look_into(stage: str) -> Callable[[nn.Module, str, Look], Callable[[], None]]:
    """How a look is taken at one of `STAGES`."""

    def take(model: nn.Module, place: str, look: Look) -> Callable[[], None]:
        attention = cast(MultiHeadAttention, model.get_submodule(place))
        probe = _Stage(stage, look)
        attention.probes.append(probe)
        return lambda: attention.probes.remove(probe)

    return take


class _Stage(Probe):
    """Shows one stage to a look: where that only looks, weights of a few queries at a time."""

    def __init__(self, stage: str, look: Look) -> None:
        self.stage, self.look = stage, look
        self.needs_weights = stage in ("weights", "scores")

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.needs_weights:
            self._begin(q, k)
        return self._see("queries", q), self._see("keys", k), self._see("values", v)

    def scores(self, scores: Tensor) -> Tensor:
        return self._see_part("scores", scores)

    def weights(self, weights: Tensor) -> Tensor:
        return self._see_part("weights", weights)

    def heads(self, heads: Tensor) -> Tensor:
        if self.needs_weights and self.look.only_looks:
            self._end()
        return self._see("heads", heads)

    def _begin(self, q: Tensor, k: Tensor) -> None:
        of_one_query = q.shape[0] * q.shape[1] * k.shape[2]
        numbers = of_one_query * q.shape[2]
        if self.look.only_looks:
            self.queries_at_once = max(_FEWEST, _AT_ONCE // max(1, of_one_query))
        how = Reduction(_as_it_is, 2) if self.look.reduction is None else self.look.reduction
        self.gathered = Gathered(how, q.shape[2])
        if self.look.reduction is None and numbers > _LITTLE:
            # Besides what is kept: the scores, and what masking and the softmax make of them.
            copies = 1 if self.look.only_looks else 4
            require_room(4 * copies * numbers, q.device, f"the {self.stage} of one layer")

    def _see(self, stage: str, x: Tensor) -> Tensor:
        found = self.look(x) if stage == self.stage else None
        return x if found is None else found

    def _see_part(self, stage: str, x: Tensor) -> Tensor:
        if stage != self.stage or not self.look.only_looks:
            return self._see(stage, x)
        self.gathered.add(x.detach())
        return x

    def _end(self) -> None:
        found = self.gathered.whole
        if found is None:
            return
        if self.look.reduction is not None:
            self.look.keep(found)
        elif isinstance(found, Tensor):
            self.look(found)
        del self.gathered


def _as_it_is(x: Tensor) -> Tensor:
    return x
