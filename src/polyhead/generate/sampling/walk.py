"""A text's way through a grammar: which tokens may come next."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np

_THREADS = 2


class Options(NamedTuple):
    """What may follow: packed bits of the vocabulary, and whether the text may end here."""

    packed: bytes
    may_end: bool

    def allowed(self, vocab_size: int) -> np.ndarray:
        """`[V]` booleans."""
        bits = np.unpackbits(np.frombuffer(self.packed, np.uint8), bitorder="little")
        return bits[:vocab_size].view(bool)


class Walk:
    """Goes to wherever it is asked about, forwards and back; drafts need not be right.

    matcher: an `llguidance.LLMatcher` at its start; end: the id by which it knows the end of a
    text, which no model draws.
    """

    def __init__(self, matcher: Any, end: int) -> None:
        self._matcher, self._end = matcher, end
        self._path: list[int] = []
        self._options: Options | None = None
        self._ahead: Future[None] | None = None

    @property
    def problem(self) -> str:
        """Why the grammar cannot go on, where it could not be followed any further."""
        self._settle()
        lines = self._matcher.get_error().splitlines() if self._matcher.is_error() else []
        return lines[0] if lines else ""

    def options(self, ids: Sequence[int]) -> Options | None:
        """What may follow these tokens; None where the grammar does not allow them themselves."""
        self._settle()
        if not self._go(ids):
            return None
        if self._options is None:
            self._look()
        return self._options

    def foresee(self, ids: Sequence[int]) -> None:
        """Work that out in another thread, for who asks next."""
        self._settle()
        self._ahead = _threads().submit(self._foresee, list(ids))

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether nothing may follow these tokens but the end."""
        options = self.options(ids)
        return options is not None and options.may_end and not any(options.packed)

    def fork(self) -> "Walk":
        """Another one at the same place."""
        self._settle()
        other = Walk(self._matcher.deep_copy(), self._end)
        other._path, other._options = [*self._path], self._options
        return other

    def _foresee(self, ids: list[int]) -> None:
        if self._go(ids) and self._options is None:
            self._look()

    def _settle(self) -> None:
        if self._ahead is not None:
            self._ahead.result()
            self._ahead = None

    def _go(self, ids: Sequence[int]) -> bool:
        same = len(self._path)
        if list(ids[:same]) != self._path:
            pairs = zip(ids, self._path, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(same, len(ids)))
        if same < len(self._path):
            self._matcher.rollback(len(self._path) - same)
            del self._path[same:]
            self._options = None
        if rest := list(ids[same:]):
            taken = self._matcher.validate_tokens(rest)
            self._matcher.consume_tokens(rest[:taken])
            self._path += rest[:taken]
            self._options = None
            return taken == len(rest)
        return True

    def _look(self) -> None:
        may_end = self._matcher.is_accepting()
        packed = bytearray(self._matcher.compute_bitmask())
        if not self._matcher.is_error():
            packed[self._end // 8] &= ~(1 << self._end % 8)
            self._options = Options(bytes(packed), may_end)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="polyhead-grammar")
