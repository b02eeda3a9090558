"""Words that a search must write: how far each hypothesis is, and who of them may go on.

Constrained beam search with banks (Post and Vilar 2018, Hu et al. 2019), as in transformers 4.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

Word = tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """Of one hypothesis; `Progress.start(config.force_words_ids)` before anything is written.

    missing: what is not written yet, each entry with its alternatives. begun: the tokens at the
    end of the text that begin one of those words. bank: tokens of words that are written, or begun.
    """

    missing: tuple[tuple[Word, ...], ...]
    begun: Word = ()
    written: int = 0

    @classmethod
    def start(cls, entries: Iterable[Iterable[Sequence[int]]]) -> Self:
        """From `force_words_ids`: entries, each of one or more alternatives."""
        return cls(tuple(tuple(tuple(word) for word in entry) for entry in entries))

    @property
    def is_done(self) -> bool:
        """Whether all of it is written: only then may a hypothesis end."""
        return not self.missing

    @property
    def bank(self) -> int:
        """How far it is; hypotheses compete with those of the same bank."""
        return self.written + len(self.begun)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The tokens that bring it further: of the word that is begun, or the first of any."""
        size = len(self.begun)
        words = (word for entry in self.missing for word in entry)
        return tuple(dict.fromkeys(w[size] for w in words if w[:size] == self.begun))

    def after(self, token: int) -> Self:
        """With one more token. A word that it breaks off may still end as the start of another."""
        tail = (*self.begun, token)
        while tail:
            for place, entry in enumerate(self.missing):
                if tail in entry:
                    missing = self.missing[:place] + self.missing[place + 1 :]
                    return replace(
                        self, missing=missing, begun=(), written=self.written + len(tail)
                    )
            if any(word[: len(tail)] == tail for entry in self.missing for word in entry):
                return replace(self, begun=tail)
            tail = tail[1:]
        return replace(self, begun=())


def allot(scores: Sequence[float], banks: Sequence[int], count: int) -> list[int]:
    """Which `count` candidates go on: the best of each bank, fullest first, then the second best.

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
