"""Looks into attention: its queries, keys, values, scores, weights and what its heads find."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from polyhead.explain.look import Look
from polyhead.explain.reduce import Kept
from polyhead.explain.room import require_room
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.probe import Probe

STAGES = ("weights", "scores", "queries", "keys", "values", "heads")
_AT_ONCE = 2**22  # numbers of which a few copies are nothing to any memory


def look_into(stage: str) -> Callable[[nn.Module, str, Look], Callable[[], None]]:
    """How a look is taken at one of `STAGES`."""

    def take(model: nn.Module, place: str, look: Look) -> Callable[[], None]:
        attention = cast(MultiHeadAttention, model.get_submodule(place))
        probe = _Stage(stage, look)
        attention.probes.append(probe)
        return lambda: attention.probes.remove(probe)

    return take


class _Stage(Probe):
    def __init__(self, stage: str, look: Look) -> None:
        self.stage, self.look = stage, look
        self.needs_weights = stage in ("weights", "scores")
        self.parts: list[Kept] = []

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.parts = []
        if self.needs_weights:
            self._divide(q, k)
        return self._see("queries", q), self._see("keys", k), self._see("values", v)

    def scores(self, scores: Tensor) -> Tensor:
        return self._see_part("scores", scores)

    def weights(self, weights: Tensor) -> Tensor:
        return self._see_part("weights", weights)

    def heads(self, heads: Tensor) -> Tensor:
        if self.parts and self.look.reduction is not None:
            self.look.keep(self.look.reduction.join(self.parts))
        return self._see("heads", heads)

    def _divide(self, q: Tensor, k: Tensor) -> None:
        """Take few queries at a time if that is possible, or see that all of them fit."""
        one = q.shape[0] * q.shape[1] * k.shape[2]
        if self.look.reduction is not None:
            self.queries_at_once = max(1, _AT_ONCE // max(1, one))
        else:
            # The scores, what the softmax makes of them, and both once more where they are masked.
            need = 4 * one * q.shape[2] * 4
            if need > 2**28:
                require_room(need, q.device, f"the {self.stage} of one layer")

    def _see(self, stage: str, x: Tensor) -> Tensor:
        found = self.look(x) if stage == self.stage else None
        return x if found is None else found

    def _see_part(self, stage: str, x: Tensor) -> Tensor:
        if stage != self.stage or self.look.reduction is None:
            return self._see(stage, x)
        self.parts.append(self.look.reduction.each(x.detach()))
        return x
