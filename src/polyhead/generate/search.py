"""Beam search: the likeliest answers, several at a time. `R` requests, `n` beams, `V` tokens.

The same steps and the same scores as in transformers, each text by itself.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig

# Beams that repeat the first one before anything is written: worse than all that can be written.
_COPY = -1e9


class Hypothesis(NamedTuple):
    """An answer's ids, its end token included, and its score: log-probability / length ** penalty.

    A drawn or greedy answer has no score.
    """

    ids: tuple[int, ...]
    score: float = 0.0


class Search(Protocol):
    """What the engine asks of a search: the texts that it is at, and what it came to."""

    @property
    def answers(self) -> list[list[int]]:
        """What each text has written, in their order."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to read."""
        ...

    def results(self) -> list[Hypothesis]:
        """What it found, the best first."""
        ...


def advance(searches: Sequence["BeamSearch"], logprobs: Tensor) -> list[list[int]]:
    """Give every search its best continuations; the beams that each goes on from.

    logprobs `[R * n, V]` of each search's unfinished answers in their order; all of as many beams.
    """
    best = logprobs.topk(min(num_wanted(searches), logprobs.shape[1]), dim=1)
    return choose(searches, best.values, best.indices)


def num_wanted(searches: Sequence["BeamSearch"]) -> int:
    """Continuations to weigh: so many that, all end tokens aside, enough are left to go on with."""
    most_ends = max(len(search.ends) for search in searches)
    return max(2, 1 + most_ends) * len(searches[0].answers)


def choose(searches: Sequence["BeamSearch"], logprobs: Tensor, tokens: Tensor) -> list[list[int]]:
    """`advance`, by the likeliest tokens `[R * n, K]` of each answer, as many as are wanted or all
    that there are, and their log-probabilities: of a search, none other is among its best."""
    num_beams, count = len(searches[0].answers), tokens.shape[1]
    so_far = torch.tensor([search.scores for search in searches], device=logprobs.device)
    totals = (logprobs.unflatten(0, (-1, num_beams)) + so_far[:, :, None]).flatten(1)
    best = totals.topk(min(num_wanted(searches), totals.shape[1]), dim=1)
    beams = best.indices // count
    chosen = tokens.unflatten(0, (-1, num_beams)).flatten(1).gather(1, best.indices)
    found = zip(searches, best.values.tolist(), beams.tolist(), chosen.tolist(), strict=True)
    return [search.take(*continuations) for search, *continuations in found]


class BeamSearch:
    """One text: its unfinished answers, the best first, and the best finished ones.

    ends: the tokens that end an answer; limit: the most tokens that it may have.
    """

    def __init__(
        self,
        config: GenerationConfig,
        ends: Collection[int],
        limit: int,
        num_beams: int | None = None,
    ) -> None:
        self.config, self.ends, self.limit = config, frozenset(ends), limit
        self.num_beams = config.num_beams if num_beams is None else num_beams
        self.answers: list[list[int]] = [[] for _ in range(self.num_beams)]
        self.last: list[int] = []
        """The tokens of the newest step, of the beams that go on, or would."""
        self.scores = [0.0] + [_COPY] * (self.num_beams - 1)
        self.finished: list[Hypothesis] = []
        self.is_done = False

    def take(self, scores: list[float], beams: list[int], tokens: list[int]) -> list[int]:
        """Go on with the best of these continuations of beams by tokens; returns the beams that
        they extend."""
        num_beams = self.num_beams
        length = len(self.answers[0]) + 1
        is_last = length == self.limit
        going: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            if not is_last and token not in self.ends:
                going.append((score, beam, token))
            # What ends below the best is there to be overtaken, not to be kept.
            elif rank < num_beams and score > _COPY:
                self.finish((*self.answers[beam], token), score)
        going = going[:num_beams]
        self.last = [token for token in tokens if token not in self.ends][:num_beams]
        self.is_done = is_last or self._cannot_improve(going[0][0], length)
        if not self.is_done:
            self.answers = [[*self.answers[beam], token] for _, beam, token in going]
            self.scores = [score for score, _, _ in going]
        return [beam for _, beam, _ in going]

    def finish(self, ids: tuple[int, ...], logprob: float) -> None:
        """Keep a text that is at its end, if it is among the best."""
        score = logprob / len(ids) ** self.config.length_penalty
        self.finished.append(Hypothesis(ids, score))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.num_beams :]

    def _cannot_improve(self, best: float, length: int) -> bool:
        config = self.config
        if best == float("-inf"):
            return True
        if len(self.finished) < self.num_beams:
            return False
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = self.limit
        return best / length**config.length_penalty <= self.finished[-1].score

    def results(self) -> list[Hypothesis]:
        return self.finished or [Hypothesis(tuple(self.answers[0]), self.scores[0])]


class DiverseBeams:
    """Groups of beams that avoid what the groups before them say at the same place (Vijayakumar et
    al. 2016): `diversity_penalty` off a token for each time that one of their beams takes it.

    `units` are the groups, searches of `num_beams / num_beam_groups` each.
    """

    def __init__(self, config: GenerationConfig, ends: Collection[int], limit: int) -> None:
        self.penalty = config.diversity_penalty
        size = config.num_beams // config.num_beam_groups
        self.units = [BeamSearch(config, ends, limit, size) for _ in range(config.num_beam_groups)]

    @property
    def answers(self) -> list[list[int]]:
        """Of the groups that are at work."""
        return [answer for unit in self.units if not unit.is_done for answer in unit.answers]

    @property
    def is_done(self) -> bool:
        """Whether every group is."""
        return all(unit.is_done for unit in self.units)

    def advance(self, logprobs: Tensor) -> list[int]:
        """Give every group at work its continuations; the rows that they go on from.

        logprobs `[rows, V]` of `answers`.
        """
        said = torch.zeros_like(logprobs[0])
        parents: list[int] = []
        start = 0
        for unit in [unit for unit in self.units if not unit.is_done]:
            until = start + len(unit.answers)
            (chosen,) = advance([unit], logprobs[start:until] - self.penalty * said)
            for token in unit.last:
                said[token] += 1
            if not unit.is_done:
                parents += [start + beam for beam in chosen]
            start = until
        return parents

    def results(self) -> list[Hypothesis]:
        """Of all groups, the best first."""
        found = [hypothesis for unit in self.units for hypothesis in unit.results()]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)
