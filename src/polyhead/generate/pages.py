"""Blocks of a paged cache: who holds which, and which can be found again by what they hold."""

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from hashlib import blake2b

NOBODY = 0
"""The block that padding is written to and read from."""


class OutOfBlocksError(Exception):
    """No block is free; somebody must give some back first."""


class BlockPool:
    """`num_blocks` blocks, block 0 aside, counted by reference.

    A block that nobody holds any more stays findable by its key until its room is needed; the one
    given back first goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NOBODY, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block: dict[Hashable, int] = {}
        self._key: dict[int, Hashable] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, those that would be forgotten for it included."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A block of one's own, whatever it holds. Errors: OutOfBlocksError."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocksError(f"all {self.num_blocks - 1} blocks are held")
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more."""
        if block == NOBODY:
            return
        self._idle.pop(block, None)
        self.holders[block] += 1

    def release(self, block: int) -> None:
        """One holder less. The last one leaves it free, or findable."""
        if block == NOBODY:
            return
        assert self.holders[block] > 0, f"block {block} was given back twice"
        self.holders[block] -= 1
        if self.holders[block]:
            return
        if block in self._key:
            self._idle[block] = None
        else:
            self._free.append(block)

    def remember(self, block: int, key: Hashable) -> None:
        """Make a block findable; of two that hold the same, the first stays so."""
        if block != NOBODY and key not in self._block and block not in self._key:
            self._block[key], self._key[block] = block, key

    def find(self, key: Hashable) -> int | None:
        """The block of this key, held by somebody or not; it is not held by asking."""
        return self._block.get(key)

    def _forget(self, block: int) -> None:
        del self._block[self._key.pop(block)]


def block_keys(ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """A key for each full block of a text, which speaks of all that is before it too.

    salt: whatever else the states depend on: a source, images, an adapter.
    """
    keys: list[bytes] = []
    extend_keys(keys, ids, block_size, salt)
    return keys


def extend_keys(keys: list[bytes], ids: Sequence[int], block_size: int, salt: bytes = b"") -> None:
    """Append the keys of the full blocks that `keys` does not cover yet."""
    for start in range(len(keys) * block_size, len(ids) - block_size + 1, block_size):
        before = keys[-1] if keys else salt
        held = array("q", ids[start : start + block_size]).tobytes()
        keys.append(blake2b(held, digest_size=16, key=before[:64]).digest())
