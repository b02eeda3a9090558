"""Words that a search must write: how far each hypothesis is, and who of them may go on.

Constrained beam search (Anderson et al. 2017) with banks (Post and Vilar 2018). A text has written
an entry when one of its alternatives stands in it; words may overlap.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

Word = tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """Of one hypothesis; `Progress.start(config.force_words_ids)` before anything is written.

    missing: what is not written yet, each entry with its alternatives. tail: as much of the text's
    end as begins one of those words.
    """

    missing: tuple[tuple[Word, ...], ...]
    tail: Word = ()

    @classmethod
    def start(cls, entries: Iterable[Iterable[Sequence[int]]]) -> Self:
        """From `force_words_ids`: entries, each of one or more alternatives."""
        return cls(tuple(tuple(tuple(word) for word in entry) for entry in entries))

    @property
    def is_done(self) -> bool:
        """Whether all of it is written: only then may a hypothesis end."""
        return not self.missing

    @cached_property
    def remaining(self) -> int:
        """Tokens that are enough to write what is missing, one word after the other."""
        shortest = [min(map(len, entry)) for entry in self.missing]
        first = (
            len(word) - _begun(self.tail, word) - least
            for entry, least in zip(self.missing, shortest, strict=True)
            for word in entry
        )
        return sum(shortest) + min(first, default=0)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The tokens that go on with a missing word. One of them makes `remaining` less."""
        words = (word for entry in self.missing for word in entry)
        return tuple(dict.fromkeys(word[_begun(self.tail, word)] for word in words))

    def after(self, token: int) -> Self:
        """With one more token."""
        seen = (*self.tail, token)
        missing = tuple(
            entry for entry in self.missing if not any(seen[-len(word) :] == word for word in entry)
        )
        begun = (_begun(seen, word) for entry in missing for word in entry)
        return type(self)(missing, seen[len(seen) - max(begun, default=0) :])


def _begun(text: Word, word: Word) -> int:
    """How many tokens at the end of a text begin a word; not all of it."""
    most = min(len(text), len(word) - 1)
    return next(k for k in range(most, -1, -1) if text[len(text) - k :] == word[:k])


def allot(scores: Sequence[float], banks: Sequence[int], count: int) -> list[int]:
    """Which `count` candidates go on: the best of each bank, highest first, then the second best.

    So those that write the words, which are unlikely, are not crowded out by those that do not.
    """
    by_score = sorted(range(len(scores)), key=lambda i: -scores[i])
    turns: dict[int, int] = defaultdict(int)
    order: list[tuple[int, int, int]] = []
    for candidate in by_score:
        bank = banks[candidate]
        order.append((turns[bank], -bank, candidate))
        turns[bank] += 1
    return [candidate for _, _, candidate in sorted(order)[:count]]
