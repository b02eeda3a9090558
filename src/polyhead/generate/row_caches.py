"""What some rows remember, as the caches that a model takes for one forward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from polyhead.generate.paged import Plan
from polyhead.nn.cache import Cache, Caches
from polyhead.nn.state import StateCache

if TYPE_CHECKING:
    from polyhead.generate.memory import Memory


class States:
    """The states of one recurrent layer, of every row."""

    def __init__(self, prototype: StateCache, max_rows: int) -> None:
        self.k = prototype.k.new_zeros(max_rows + 1, *prototype.k.shape[1:])
        self.v = self.k.clone()
        self.cache = prototype

    def open(self, rows: Tensor) -> None:
        """Let the cache hold these rows."""
        self.cache.k, self.cache.v = self.k[rows], self.v[rows]

    def close(self, rows: Tensor) -> None:
        """Keep what the cache holds now."""
        self.k[rows], self.v[rows] = self.cache.k, self.cache.v

    def share(self, row: int, target: int) -> None:
        """Let a row hold what another one holds."""
        self.k[target], self.v[target] = self.k[row], self.v[row]


@dataclass(frozen=True)
class Fixed:
    """What steps of the same shapes read where it lies, whatever it holds: of `B` rows."""

    plans: dict[object, Plan]
    at: Tensor  # [B, 1]
    index: Tensor  # [B]
    lengths: Tensor  # [B]

    def take(self, other: "Fixed") -> None:
        """Be another one of the same shapes, in the same places."""
        for name in ("at", "index", "lengths"):
            getattr(self, name).copy_(getattr(other, name))
        for kind, plan in other.plans.items():
            self.plans[kind].take(plan)


class RowCaches(Caches):
    """The caches of some rows, for one forward: `open`, the model's own begin and end, done."""

    layers: list[Any]

    def __init__(self, memory: "Memory", layers: list[Cache]) -> None:
        self.memory, self.layers = memory, layers
        self.cross = list(memory.cross)
        self.is_static = False
        self._sources: tuple[int, ...] | None = None
        self._fixed: Fixed | None = None

    def open(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """These rows hold `starts` tokens each and read `counts` more."""
        device = self.memory.device
        self._index = torch.tensor(rows, device=device)
        first, added = np.array(starts), np.array(counts)
        width = max(counts)
        self.lengths = torch.tensor(starts, device=device)
        steps = torch.arange(width, device=device)
        self._at = self.lengths[:, None] + steps
        if min(counts) < width:
            self._at = torch.where(
                steps < torch.tensor(counts, device=device)[:, None], self._at, -1
            )
        uniform = starts[0] if len(set(starts)) == 1 else None
        plans = {
            kind: tables.place.plan(tables.blocks[list(rows)], first, added, width)
            for kind, tables in self.memory.kinds.items()
        }
        self._follow(plans, uniform)

    def open_mixed(self, parts: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> None:
        """Rows that hold so many tokens each and all read so many more, part by part: one forward
        reads them all, as rows of one token. Not for layers with states."""
        at = np.concatenate(
            [(np.array(starts)[:, None] + np.arange(count)).ravel() for _, starts, count in parts]
        )
        self.lengths = torch.from_numpy(at).to(self.memory.device)
        self._at = self.lengths[:, None]
        plans = {
            kind: Plan.side_by_side(
                [
                    tables.place.plan(
                        tables.blocks[list(rows)], np.array(starts),
                        np.full(len(rows), count), count,
                    )
                    for rows, starts, count in parts
                ]
            )
            for kind, tables in self.memory.kinds.items()
        }  # fmt: skip
        self._follow(plans, None)

    def open_fixed(self, rows: Sequence[int], starts: Sequence[int]) -> None:
        """These rows, and nobody's up to as many as there may be, read a token each.

        All that changes from step to step changes in place.
        """
        fresh = self.fixed(rows, starts, self.memory.max_rows, self.memory.max_len)
        if self._fixed is None:
            self._fixed = fresh
        self._fixed.take(fresh)
        self.follow(self._fixed)

    def fixed(self, rows: Sequence[int], starts: Sequence[int], batch: int, longest: int) -> Fixed:
        """For these rows, and nobody's up to `batch`, that hold `starts` tokens each, fewer than
        `longest`, and read one more."""
        device, missing = self.memory.device, batch - len(rows)
        rows = [*rows, *[self.memory.max_rows] * missing]
        first = np.array([*starts, *[0] * missing])
        plans = {
            kind: tables.place.plan(tables.blocks[rows], first, np.ones_like(first), 1, longest)
            for kind, tables in self.memory.kinds.items()
        }
        lengths = torch.from_numpy(first).to(device)
        return Fixed(plans, lengths[:, None].clone(), torch.tensor(rows, device=device), lengths)

    def follow(self, fixed: Fixed) -> None:
        """Let the next forward read where `fixed` says."""
        self._at, self._index, self.lengths = fixed.at, fixed.index, fixed.lengths
        self._follow(fixed.plans, None)

    def _follow(self, plans: Mapping[object, Plan], uniform: int | None) -> None:
        """Let every layer read and write where the plan of its kind says."""
        for kind, tables in self.memory.kinds.items():
            for layer in tables.layers:
                layer.plan = plans[kind]
        for layer in self.layers:
            layer.lengths, layer.uniform = self.lengths, uniform
        for states in self.memory.states:
            states.open(self._index)

    def open_sources(self, rows: Sequence[int], lengths: Sequence[int], are_new: bool) -> None:
        """The rows' sources have `lengths` tokens each; `are_new` if they are to be read now."""
        sources = self.memory.sources
        assert sources is not None
        which = tuple(rows)
        if not are_new and which == self._sources:
            return
        held, counts = np.array(lengths), np.zeros(len(rows), dtype=np.int64)
        if are_new:
            held, counts = counts, held
        plan = sources.place.plan(sources.blocks[list(rows)], held, counts, max(lengths))
        for cross in self.memory.cross:
            cross.plan = plan
            cross.held = None if are_new else cross.read()
        self._sources = which

    def fixed_sources(
        self, rows: Sequence[int], lengths: Sequence[int], batch: int, longest: int
    ) -> Plan:
        """Where these rows, and nobody's up to `batch`, read sources; none is beyond `longest`."""
        sources, missing = self.memory.sources, batch - len(rows)
        assert sources is not None
        blocks = sources.blocks[[*rows, *[self.memory.max_rows] * missing]]
        held = np.array([*lengths, *[1] * missing])
        return sources.place.plan(blocks, held, np.zeros_like(held), 1, longest)

    def follow_sources(self, plan: Plan) -> None:
        """Let the next forward read sources where the plan says."""
        for cross in self.memory.cross:
            cross.plan = plan
            cross.held = cross.read()
        self.forget_sources()

    def forget_sources(self) -> None:
        """A row may stand for another source from now on."""
        self._sources = None

    def begin(self, num_tokens: int, keep: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            layer.is_open = True
        return self._at

    def end(self) -> None:
        for layer in self.layers:
            layer.is_open = False
        for states in self.memory.states:
            states.close(self._index)
