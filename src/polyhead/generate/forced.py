"""Beam search for texts that hold given words. `n` beams, `V` vocabulary.

Anderson et al. 2017 (what counts as written), Post and Vilar 2018 (who goes on).
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling.forced_words import Progress, allot
from polyhead.generate.search import BeamSearch, Hypothesis

_NEVER = float("-inf")


class _Candidate(NamedTuple):
    score: float
    beam: int
    token: int
    progress: Progress
    """With this token."""


class ForcedBeams(BeamSearch):
    """`BeamSearch` for `force_words_ids`: every text that it finds holds them.

    Beams that lack equally many tokens of the words are a bank, and compete with each other; the
    banks take turns. A text ends only where it lacks nothing, and none goes on that could no longer
    write all it lacks. Errors: ConfigError for words that cannot be written within `limit` or hold
    a token that ends a text.
    """

    def __init__(self, config: GenerationConfig, ends: Collection[int], limit: int) -> None:
        super().__init__(config, ends, limit)
        start = Progress.start(config.force_words_ids)
        # The beams but the first only keep their place, until there is enough to go on with.
        self.scores = [0.0] + [_NEVER] * (self.num_beams - 1)
        self.progress = [start] * self.num_beams
        self.room = limit - (config.forced_eos_token_id is not None)
        self._check(start)

    def _check(self, start: Progress) -> None:
        for word in (word for entry in start.missing for word in entry):
            if ended := self.ends & set(word):
                raise ConfigError(
                    f"force_words_ids has {list(word)}, and token {min(ended)} ends a text; "
                    "remove the word, or set ignore_eos"
                )
        for token in self.config.forced_ids:
            start = start.after(token)
        if (needed := len(self.config.forced_ids) + start.remaining) > self.room:
            raise ConfigError(
                f"force_words_ids needs {needed} tokens, and {self.room} may be written; "
                "give a larger max_new_tokens, or fewer words"
            )

    def advance(self, logprobs: Tensor) -> list[int]:
        """Go on with the best of each bank; returns the beams that they extend.

        logprobs `[n, V]` of `answers`.
        """
        length = len(self.answers[0]) + 1
        is_last = length == self.limit
        candidates = self._candidates(logprobs, length)
        whole = sorted(
            (each for each in candidates if each.progress.is_done), key=lambda each: -each.score
        )
        for score, beam, token, _ in whole[: self.num_beams]:
            if is_last or token in self.ends:
                self.finish((*self.answers[beam], token), score)
        going = [] if is_last else [each for each in candidates if each.token not in self.ends]
        banks = [-each.progress.remaining for each in going]
        chosen = [going[i] for i in allot([each.score for each in going], banks, self.num_beams)]
        best = max((each.score for each in chosen), default=_NEVER)
        self.is_done = is_last or self._cannot_improve(best, length)
        if self.is_done:
            return []
        chosen += [chosen[0]._replace(score=_NEVER)] * (self.num_beams - len(chosen))
        self.answers = [[*self.answers[each.beam], each.token] for each in chosen]
        self.scores = [each.score for each in chosen]
        self.progress = [each.progress for each in chosen]
        return [each.beam for each in chosen]

    def _candidates(self, logprobs: Tensor, length: int) -> list[_Candidate]:
        """The likeliest tokens after each beam, and those that its words want, where they may come.

        length: of the answers with them.
        """
        totals = logprobs + torch.tensor(self.scores, device=logprobs.device)[:, None]
        likely = totals.topk(min(self.num_beams + len(self.ends), totals.shape[1]), dim=1)
        places = [
            (beam, token)
            for beam, (some, progress) in enumerate(
                zip(likely.indices.tolist(), self.progress, strict=True)
            )
            for token in dict.fromkeys((*some, *progress.wanted))
        ]
        beams, tokens = torch.tensor(places, device=totals.device).unbind(1)
        left = max(0, self.room - length)
        found: list[_Candidate] = []
        for (beam, token), score in zip(places, totals[beams, tokens].tolist(), strict=True):
            progress = self.progress[beam].after(token)
            may_come = progress.is_done if token in self.ends else progress.remaining <= left
            if may_come and score > _NEVER:
                found.append(_Candidate(score, beam, token, progress))
        return found

    def results(self) -> list[Hypothesis]:
        """None, where no text holds all words; before the end, the best so far."""
        return self.finished if self.is_done else super().results()
