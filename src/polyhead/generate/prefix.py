"""A key/value cache that outlives a call, for prompts that begin alike."""

from collections.abc import Sequence

from polyhead.nn.cache import Caches


class PrefixCache:
    """One row's caches and the ids they hold; empty at first."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._caches: Caches | None = None

    def take(self, prompt: Sequence[int]) -> Caches | None:
        """The caches, cut back to what `prompt` begins with; None where they are of no use.

        At least the prompt's last id is left to compute. Until `put`, nothing is held.
        """
        caches, ids = self._caches, self.ids
        self._caches, self.ids = None, []
        if caches is None:
            return None
        shared = _common(ids, prompt[:-1])
        if shared == 0:
            return None
        try:
            caches.truncate([shared])
        except ValueError:  # a rolling window has forgotten what it would have to go back to
            return None
        return caches

    def put(self, caches: Caches, ids: Sequence[int]) -> None:
        """Hold caches that were fed the start of `ids`."""
        self._caches, self.ids = caches, list(ids[: int(caches.lengths[0])])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
