"""What the rows of an engine remember: tables of blocks for attention, states for recurrence.

A row is a text at work. Layers that look equally far back share a table and a pool of blocks.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polyhead.generate.paged import (
    Geometry,
    Int8Pages,
    Numbers,
    PagedCache,
    PagedCross,
    Pages,
    Plan,
)
from polyhead.generate.pages import NOBODY, BlockPool, OutOfBlocksError
from polyhead.nn.cache import Cache, Caches
from polyhead.nn.rolling import RollingCache
from polyhead.nn.state import StateCache


class Copies(Protocol):
    """A layer whose blocks can be copied."""

    plan: Plan

    def copy(self, source: int, target: int) -> None: ...


class Tables:
    """The blocks of every row, for layers of one kind."""

    def __init__(self, place: Geometry, max_rows: int, max_len: int) -> None:
        self.place, self.pool = place, BlockPool(place.num_blocks)
        self.layers: list[Copies] = []
        self.blocks: Numbers = np.full(
            (max_rows + 1, -(-max_len // place.block_size)), NOBODY, dtype=np.int64
        )  # the last row is nobody's
        self.first, self.end = [0] * max_rows, [0] * max_rows  # the blocks that a row holds

    def missing(self, wanted: Sequence[tuple[int, int, int]]) -> int:
        """Blocks to be taken before rows that hold `held` tokens can hold `length`, each."""
        size, needed = self.place.block_size, 0
        writers: Counter[int] = Counter()
        for row, held, length in wanted:
            needed += max(0, -(-length // size) - self.end[row])
            if held % size:
                writers[int(self.blocks[row, held // size])] += 1
        # Of those who hold a block that is not full, the last one writes on in it.
        for block, count in writers.items():
            needed += min(count, self.pool.holders[block] - 1)
        return needed

    def extend(self, row: int, held: int, length: int) -> None:
        """Take them. What others hold too is copied before it is written to."""
        size = self.place.block_size
        if held % size:
            last = held // size
            block = int(self.blocks[row, last])
            if self.pool.holders[block] > 1:
                own = self.pool.take()
                for layer in self.layers:
                    layer.copy(block, own)
                self.pool.release(block)
                self.blocks[row, last] = own
        for index in range(self.end[row], -(-length // size)):
            self.blocks[row, index] = self.pool.take()
            self.end[row] = index + 1

    def share(self, row: int, target: int) -> None:
        """Let an empty row hold what another one holds."""
        for block in self.blocks[row, : self.end[row]].tolist():
            self.pool.hold(block)
        self.blocks[target] = self.blocks[row]
        self.first[target], self.end[target] = self.first[row], self.end[row]

    def leave_behind(self, row: int, held: int) -> None:
        """Give back the blocks that no later token looks at."""
        for index in range(self.first[row], min(self.place.first_block(held), self.end[row])):
            self._give_back(row, index)
            self.first[row] = index + 1

    def cut(self, row: int, length: int) -> None:
        """Give back the blocks beyond `length` tokens."""
        needed = -(-length // self.place.block_size)
        for index in range(needed, self.end[row]):
            self._give_back(row, index)
        self.end[row] = min(needed, self.end[row])

    def close(self, row: int) -> None:
        """Give back all. The last first, as a text is found again from its beginning."""
        for index in range(self.end[row] - 1, self.first[row] - 1, -1):
            self._give_back(row, index)
        self.first[row] = self.end[row] = 0

    def remember(self, row: int, keys: Sequence[bytes], until: int, since: int) -> None:
        """Make the blocks of these tokens findable."""
        size = self.place.block_size
        for index in range(max(since // size, self.first[row]), until // size):
            self.pool.remember(int(self.blocks[row, index]), keys[index])

    def _give_back(self, row: int, index: int) -> None:
        self.pool.release(int(self.blocks[row, index]))
        self.blocks[row, index] = NOBODY


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


class Memory:
    """`max_rows` rows of up to `max_len` tokens, over blocks for `num_tokens` tokens in all.

    kv: "model" holds keys and values as the model computes them, "int8" in eight bits.
    """

    def __init__(
        self,
        backbone: Any,
        max_rows: int,
        max_len: int,
        num_tokens: int,
        block_size: int = 16,
        kv: str = "model",
        source_tokens: int = 0,
    ) -> None:
        self.block_size, self.max_rows, self.max_len = block_size, max_rows, max_len
        prototype: Caches = backbone.make_caches(1)
        self.device = prototype.lengths.device
        pages = Int8Pages if kv == "int8" else Pages
        self.kinds: dict[object, Tables] = {}
        self.states: list[States] = []
        layers: list[Cache] = []
        for cache in prototype:
            if isinstance(cache, StateCache):
                self.states.append(States(cache, max_rows))
                layers.append(cache)
                continue
            window = cache.window if isinstance(cache, RollingCache) else None
            tables = self._tables(cache.k, window, num_tokens, max_len)
            layer = PagedCache(*(pages(tables.place, cache.k.shape[3], cache.k) for _ in "kv"))
            tables.layers.append(layer)
            layers.append(layer)
        self.cross: list[PagedCross] = []
        self.sources: Tables | None = None
        for cache in layers[: len(prototype.cross)]:
            assert isinstance(cache, PagedCache)
            like = cache.k_pages
            if self.sources is None:
                place = Geometry(
                    num_tokens // block_size + 1,
                    block_size,
                    like.place.num_heads,
                    None,
                    self.device,
                )
                self.sources = Tables(place, max_rows, source_tokens)
            held = prototype[0].k
            layer = PagedCross(*(pages(self.sources.place, like.head_dim, held) for _ in "kv"))
            self.sources.layers.append(layer)
            self.cross.append(layer)
        self.caches = RowCaches(self, layers)
        self._free = list(range(max_rows - 1, -1, -1))

    @property
    def all_tables(self) -> list[Tables]:
        return [*self.kinds.values(), *([self.sources] if self.sources else [])]

    @property
    def finds_prefixes(self) -> bool:
        """Whether what is held can be found again: a state speaks of its last token alone."""
        return not self.states and self.sources is None and bool(self.kinds)

    @property
    def num_free_rows(self) -> int:
        return len(self._free)

    def open(self) -> int:
        """A row that holds nothing."""
        return self._free.pop()

    def close(self, row: int) -> None:
        """Give a row and its blocks back."""
        for tables in self.all_tables:
            tables.close(row)
        self.caches.forget_sources()
        self._free.append(row)

    def fork(self, row: int) -> int:
        """A row that holds what another one holds, by reference."""
        target = self.open()
        for tables in self.all_tables:
            tables.share(row, target)
        for state in self.states:
            state.share(row, target)
        return target

    def can_extend(self, wanted: Sequence[tuple[int, int, int]]) -> bool:
        """Whether rows `(row, held, length)` can all grow to their lengths."""
        return all(tables.missing(wanted) <= tables.pool.num_free for tables in self.kinds.values())

    def extend(self, row: int, held: int, length: int) -> None:
        """Make room for the tokens from `held` to `length`. Errors: OutOfBlocksError."""
        if not self.can_extend([(row, held, length)]):
            raise OutOfBlocksError(f"no room for {length} tokens")
        for tables in self.kinds.values():
            tables.extend(row, held, length)

    def has_room(self, keys: Sequence[bytes], length: int, rows: int, source: int = 0) -> bool:
        """Whether a text of `length` tokens, going on in `rows` rows, fits what is free now.

        keys: of its full blocks; what others hold of them anyway needs no room.
        """
        if self.sources is not None and self._blocks(source) > self.sources.pool.num_free:
            return False
        for tables in self.kinds.values():
            needed = self._blocks(length) + rows - 1
            if tables.place.window is not None:
                needed = min(needed, self._blocks(tables.place.window) + rows + 1)
            shared = [tables.pool.find(key) for key in keys]
            needed -= sum(block is not None and tables.pool.holders[block] > 0 for block in shared)
            if needed > tables.pool.num_free:
                return False
        return True

    def known(self, keys: Sequence[bytes], most: int) -> int:
        """Tokens of the longest known start of a text, `most` at most; keys: of its full blocks."""
        count = min(len(keys), most // self.block_size)
        for tables in self.kinds.values():
            if tables.place.window is None:
                missing = (i for i in range(count) if tables.pool.find(keys[i]) is None)
                count = next(missing, count)
        while count and any(
            tables.pool.find(key) is None
            for tables in self.kinds.values()
            if tables.place.window is not None
            for key in keys[tables.place.first_block(count * self.block_size) : count]
        ):
            count -= 1
        return count * self.block_size

    def adopt(self, row: int, keys: Sequence[bytes], most: int) -> int:
        """Hold, in an empty row, what is `known` of a text; how many tokens that is."""
        length = self.known(keys, most)
        count = length // self.block_size
        for tables in self.kinds.values():
            first = tables.place.first_block(length)
            for index in range(first, count):
                block = tables.pool.find(keys[index])
                assert block is not None
                tables.pool.hold(block)
                tables.blocks[row, index] = block
            tables.first[row], tables.end[row] = first, count
        return length

    def longest(self, prompt: int, rows: int) -> int:
        """Tokens that each of `rows` texts, alike in their prompt, may have where all is theirs."""
        length = self.max_len
        for tables in self.kinds.values():
            if tables.place.window is None:
                blocks = tables.place.num_blocks - 1
                shared = prompt // self.block_size
                length = min(length, (shared + max(0, blocks - shared) // rows) * self.block_size)
        return length

    def open_source(self, row: int, length: int) -> None:
        """Make room for a row's source."""
        if self.sources is not None:
            self.sources.extend(row, 0, length)

    def _blocks(self, length: int) -> int:
        return -(-length // self.block_size)

    def remember(self, row: int, keys: Sequence[bytes], until: int, since: int) -> None:
        """Make the full blocks among the tokens from `since` to `until` findable."""
        for tables in self.kinds.values():
            tables.remember(row, keys, until, since)

    def leave_behind(self, row: int, held: int) -> None:
        """Give back what no token from `held` on looks at."""
        for tables in self.kinds.values():
            if tables.place.window is not None:
                tables.leave_behind(row, held)

    def cut(self, row: int, length: int) -> None:
        """Give back the room for tokens beyond `length`."""
        for tables in self.kinds.values():
            tables.cut(row, length)

    def _tables(self, k: Tensor, window: int | None, num_tokens: int, max_len: int) -> Tables:
        kind = (k.shape[1], k.shape[3], window)
        if kind not in self.kinds:
            if window is not None:
                # A row holds its window and what it reads at once.
                most = self.max_rows * (min(2 * window, max_len) + 2 * self.block_size)
                num_tokens = min(num_tokens, most)
            place = Geometry(
                -(-num_tokens // self.block_size) + 1, self.block_size, k.shape[1], window, k.device
            )
            self.kinds[kind] = Tables(place, self.max_rows, max_len)
        return self.kinds[kind]


class RowCaches(Caches):
    """The caches of some rows, for one forward: `open`, the model's own begin and end, done."""

    layers: list[Any]

    def __init__(self, memory: Memory, layers: list[Cache]) -> None:
        self.memory, self.layers = memory, layers
        self.cross = list(memory.cross)
        self.is_static = False
        self._sources: tuple[int, ...] | None = None
        self._fixed: tuple[dict[object, Plan], Tensor, Tensor, Tensor] | None = None

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
        for tables in self.memory.kinds.values():
            plan = tables.place.plan(tables.blocks[list(rows)], first, added, width)
            for layer in tables.layers:
                layer.plan = plan
        for layer in self.layers:
            layer.lengths, layer.uniform = self.lengths, uniform
        for states in self.memory.states:
            states.open(self._index)

    def open_fixed(self, rows: Sequence[int], starts: Sequence[int]) -> None:
        """These rows, and nobody's up to as many as there may be, read a token each.

        All that changes from step to step changes in place.
        """
        missing = self.memory.max_rows - len(rows)
        rows = [*rows, *[self.memory.max_rows] * missing]
        first = np.array([*starts, *[0] * missing])
        at, index = torch.from_numpy(first)[:, None], torch.tensor(rows)
        added = np.ones_like(first)
        plans = {
            kind: tables.place.plan(tables.blocks[rows], first, added, 1, fixed=True)
            for kind, tables in self.memory.kinds.items()
        }
        if self._fixed is None:
            device = self.memory.device
            self._fixed = plans, at.to(device), index.to(device), at[:, 0].to(device)
        held, self._at, self._index, self.lengths = self._fixed
        self._at.copy_(at)
        self._index.copy_(index)
        self.lengths.copy_(at[:, 0])
        for kind, tables in self.memory.kinds.items():
            held[kind].take(plans[kind])
            for layer in tables.layers:
                layer.plan = held[kind]
        for layer in self.layers:
            layer.lengths, layer.uniform = self.lengths, None
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
