"""What the rows of an engine remember: tables of blocks for attention, states for recurrence.

A row is a text at work. Layers that look equally far back share a table and a pool of blocks.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyhead.generate.paged import KINDS, Geometry, PagedCache, PagedCross, PagedLayer
from polyhead.generate.row_caches import RowCaches, States
from polyhead.generate.tables import Tables
from polyhead.kernels.held import Held
from polyhead.nn.cache import Cache, Caches
from polyhead.nn.rolling import RollingCache
from polyhead.nn.state import StateCache


class Memory:
    """`max_rows` rows of up to `max_len` tokens, over blocks for `num_tokens` tokens in all.

    kv: how keys and values are held, one of `KINDS`.
    whole_prompts: a row may read all of its prompt at once; otherwise, where layers have a window,
    `most_at_once` tokens.
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
        whole_prompts: bool = False,
    ) -> None:
        self.block_size, self.max_rows, self.max_len = block_size, max_rows, max_len
        self.source_len = source_tokens
        self.most_at_once = max_len
        self._whole_prompts = whole_prompts
        prototype: Caches = backbone.make_caches(1)
        self.device = prototype.lengths.device
        pages = KINDS[kv]
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
                blocks, heads = -(-source_tokens // block_size) + 1, like.place.num_heads
                place = Geometry(blocks, block_size, heads, None, self.device)
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

    def held(self) -> tuple[list[Held], list[Held]]:
        """Where the layers keep what they hold, and the cross-attention layers, if any."""
        tables = {layer: tables for tables in self.all_tables for layer in tables.layers}

        def where(layers: Sequence[PagedLayer]) -> list[Held]:
            return [layer.where(tables[layer].blocks) for layer in layers]

        return where(self.caches.layers), where(self.cross)

    @property
    def num_bytes(self) -> int:
        """What keys and values take, held or not."""
        layers = [x for x in (*self.caches.layers, *self.cross) if isinstance(x, PagedLayer)]
        return sum(x.k_pages.num_bytes() + x.v_pages.num_bytes() for x in layers)

    @property
    def finds_prefixes(self) -> bool:
        """Whether what is held can be found again: a state speaks of its last token alone."""
        return not self.states and self.sources is None and bool(self.kinds)

    @property
    def used(self) -> float:
        """The share of blocks that texts hold, of the kind of layer that has the least free."""
        return max(
            (1 - tables.pool.num_free / max(1, tables.pool.num_blocks - 1)
             for tables in self.kinds.values()), default=0.0,
        )  # fmt: skip

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

    def make_room(self, wanted: Sequence[tuple[int, int, int]]) -> bool:
        """Let rows that hold `held` tokens have room for `length`, `(row, held, length)` each.

        False where there is too little for all of them; then none has more than before.
        """
        growing = [
            (tables, [one for one in wanted if not tables.holds(*one)])
            for tables in self.kinds.values()
        ]
        if any(tables.missing(some) > tables.pool.num_free for tables, some in growing):
            return False
        for tables, some in growing:
            for one in some:
                # Of those that shared a block, the last has it alone by now.
                if not tables.holds(*one):
                    tables.extend(*one)
        return True

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
            blocks = tables.place.num_blocks - 1
            shared = prompt // self.block_size
            most = (shared + max(0, blocks - shared) // rows) * self.block_size
            if tables.place.window is not None:
                # What a window leaves behind is no longer shared, but makes room.
                most = blocks // rows * self.block_size
                if most >= self._span(tables.place.window):
                    continue
            length = min(length, most)
        return length

    def open_source(self, row: int, length: int, like: int | None = None) -> None:
        """Make room for a row's source, or take that of a row that reads the same."""
        if self.sources is None:
            return
        if like is None or like == row:
            self.sources.extend(row, 0, length)
        else:
            self.sources.share(like, row)

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

    def _span(self, window: int) -> int:
        """Slots, of whole blocks, for a window and what is read at once, neither of which begins
        with a block."""
        read = self.max_len if self._whole_prompts else window
        return (self._blocks(min(window + read, self.max_len)) + 2) * self.block_size

    def _tables(self, k: Tensor, window: int | None, num_tokens: int, max_len: int) -> Tables:
        kind = (k.shape[1], k.shape[3], window)
        if kind not in self.kinds:
            if window is not None:
                if not self._whole_prompts:
                    self.most_at_once = min(self.most_at_once, window)
                num_tokens = min(num_tokens, self.max_rows * self._span(window))
            place = Geometry(
                -(-num_tokens // self.block_size) + 1, self.block_size, k.shape[1], window, k.device
            )
            self.kinds[kind] = Tables(place, self.max_rows, max_len)
        return self.kinds[kind]
