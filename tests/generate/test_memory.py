"""Rows over blocks: whatever comes, each row finds its own tokens, and no block is lost.

POLYHEAD_EXAMPLES=10000 tries so many random lives, in place of 150.
"""

import os
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyhead.generate.memory import Memory
from polyhead.generate.pages import NOBODY, BlockPool, OutOfBlocksError, block_keys
from polyhead.generate.tables import Tables
from polyhead.nn.cache import Caches, GrowingCache
from polyhead.nn.rolling import RollingCache

SIZE, WINDOW, ROWS, LONGEST, TOKENS = 4, 6, 5, 40, 64
LIKE = torch.zeros(1)


def memory() -> Memory:
    layers = [GrowingCache(1, 1, 1, LIKE), RollingCache(1, 1, 1, WINDOW, LIKE)]
    backbone = SimpleNamespace(make_caches=lambda rows: Caches(layers))
    return Memory(backbone, ROWS, LONGEST, TOKENS, SIZE)


class Notes:
    """What each slot of each block was last written with, in place of keys and values."""

    def __init__(self, tables: Tables) -> None:
        self.slots = [[-1] * SIZE for _ in range(tables.place.num_blocks)]

    def copy(self, source: int, target: int) -> None:
        self.slots[target] = list(self.slots[source])


class Rows(RuleBasedStateMachine):
    """Texts that are read, forked, cut back, found again and given up, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory()
        self.notes = {kind: Notes(tables) for kind, tables in self.memory.kinds.items()}
        for kind, tables in self.memory.kinds.items():
            tables.layers = [self.notes[kind]]
        self.texts: dict[int, list[int]] = {}

    def pick(self, data: Any) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    @precondition(lambda self: self.memory.num_free_rows)
    @rule(data=st.data(), start=st.lists(st.integers(0, 1), max_size=20))
    def open(self, data: Any, start: list[int]) -> None:
        row = self.memory.open()
        found = self.memory.adopt(row, block_keys(start, SIZE), max(0, len(start) - 1))
        assert found % SIZE == 0
        assert found <= len(start)
        self.texts[row] = start[:found]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def read(self, data: Any, more: list[int]) -> None:
        row = self.pick(data)
        ids = self.texts[row]
        more = more[: LONGEST - len(ids)]
        length = len(ids) + len(more)
        free = {kind: tables.pool.num_free for kind, tables in self.memory.kinds.items()}
        if not self.memory.make_room([(row, len(ids), length)]):
            assert free == {k: tables.pool.num_free for k, tables in self.memory.kinds.items()}
            return
        for kind, tables in self.memory.kinds.items():
            for place, token in enumerate(more, len(ids)):
                block = int(tables.blocks[row, place // SIZE])
                assert block != NOBODY
                assert tables.pool.holders[block] == 1, "a block that others hold is written to"
                self.notes[kind].slots[block][place % SIZE] = token
        before = len(ids)
        self.texts[row] = ids = [*ids, *more]
        self.memory.remember(row, block_keys(ids, SIZE), len(ids), before)
        self.memory.leave_behind(row, len(ids))

    @precondition(lambda self: self.texts and self.memory.num_free_rows)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        row = self.pick(data)
        self.texts[self.memory.fork(row)] = list(self.texts[row])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), guesses=st.integers(1, 6))
    def guess(self, data: Any, guesses: int) -> None:
        """Room for a draft of which nothing is kept."""
        row = self.pick(data)
        length = len(self.texts[row])
        until = min(LONGEST, length + guesses)
        if self.memory.make_room([(row, length, until)]):
            self.memory.cut(row, length)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def close(self, data: Any) -> None:
        row = self.pick(data)
        self.memory.close(row)
        del self.texts[row]

    @invariant()
    def every_row_finds_its_own(self) -> None:
        for kind, tables in self.memory.kinds.items():
            for row, ids in self.texts.items():
                first = tables.place.first_block(len(ids)) * SIZE
                held = [
                    self.notes[kind].slots[int(tables.blocks[row, place // SIZE])][place % SIZE]
                    for place in range(first, len(ids))
                ]
                assert held == ids[first:]

    @invariant()
    def no_block_is_lost(self) -> None:
        for tables in self.memory.kinds.values():
            pool = tables.pool
            held = Counter(
                int(block) for row in self.texts for block in tables.blocks[row] if block != NOBODY
            )
            assert {b: n for b, n in enumerate(pool.holders) if n} == dict(held)
            assert len(held) + pool.num_free == pool.num_blocks - 1
            closed = [row for row in range(ROWS) if row not in self.texts]
            assert not tables.blocks[closed].any()


TestRows = Rows.TestCase
TestRows.settings = settings(
    max_examples=int(os.environ.get("POLYHEAD_EXAMPLES", "150")), stateful_step_count=40,
    deadline=None, suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def test_a_block_is_found_until_its_room_is_needed() -> None:
    pool = BlockPool(4)
    one, two = pool.take(), pool.take()
    pool.remember(one, "one")
    pool.remember(two, "two")
    pool.release(two)
    pool.release(one)
    assert (pool.find("one"), pool.find("two"), pool.num_free) == (one, two, 3)
    pool.take()
    assert pool.find("two") == two
    pool.take()  # the one given back first goes first
    assert (pool.find("one"), pool.find("two")) == (one, None)
    pool.hold(one)
    with pytest.raises(OutOfBlocksError):
        pool.take()
    pool.release(one)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.release(one)


@pytest.mark.parametrize(
    ("texts", "salts", "same"),
    [
        (([1, 2, 3, 4], [1, 2, 3, 4]), (b"", b""), True),
        (([1, 2, 3, 4], [1, 2, 3, 5]), (b"", b""), False),
        (([1, 2, 3, 4], [1, 2, 3, 4]), (b"", b"an image"), False),
        (([9, 9, 9, 9, 1, 2, 3, 4], [8, 8, 8, 8, 1, 2, 3, 4]), (b"", b""), False),
    ],
)
def test_a_key_speaks_of_all_that_is_before(
    texts: Sequence[list[int]], salts: Sequence[bytes], same: bool
) -> None:
    one, two = (block_keys(ids, 4, salt) for ids, salt in zip(texts, salts, strict=True))
    assert (one[-1] == two[-1]) == same
    assert len(block_keys([1] * 11, 4)) == 2
