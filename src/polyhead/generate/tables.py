"""The blocks that rows hold: taken, shared, copied before they are written to, and given back."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from polyhead.generate.paged import Geometry, Numbers, Plan
from polyhead.generate.pages import NOBODY, BlockPool


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

    def holds(self, row: int, held: int, length: int) -> bool:
        """Whether a row that holds `held` tokens can hold `length` in the blocks that it has."""
        size = self.place.block_size
        if length > self.end[row] * size:
            return False
        return held % size == 0 or self.pool.holders[self.blocks[row, held // size]] == 1

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
