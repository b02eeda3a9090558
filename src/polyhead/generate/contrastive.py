"""Contrastive search: what is likely and unlike what was said (Su et al. 2022, equation 5).

`k` candidates, `E` model width, `V` vocabulary.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.generate.search import Hypothesis


class ContrastiveSearch:
    """One text and the `k` likeliest tokens to follow it, each of which is read before one is kept.

    A candidate scores (1 - alpha) × its probability - alpha × its state's largest cosine to those
    of the tokens before it, the prompt's included.
    """

    def __init__(self, k: int, alpha: float, ends: Collection[int], limit: int) -> None:
        self.k, self.alpha, self.ends, self.limit = k, alpha, ends, limit
        self.chosen: list[int] = []
        self.answers: list[list[int]] = [[] for _ in range(k)]
        self.is_done = False
        self._context: list[Tensor] = []  # [some, E] each, of length one
        self._likely = self._is_banned = torch.empty(0)

    def read(self, states: Tensor) -> None:
        """Take in the states `[T, E]` of tokens that are there for good."""
        self._context.append(F.normalize(states.float(), dim=-1))

    def advance(self, states: Tensor | None, logits: Tensor) -> list[int]:
        """Keep one of the candidates that were read, choose the next ones, and tell their rows.

        states `[k, E]` and logits `[k, V]` after each candidate; None, `[1, V]` after the prompt.
        """
        best = 0
        if states is not None:
            own = F.normalize(states.float(), dim=-1)
            likeness = (own @ torch.cat(self._context).T).amax(1)
            scores = (1 - self.alpha) * self._likely - self.alpha * likeness
            # Of fewer than k allowed tokens, a banned one may be the least like what was said.
            best = int(scores.masked_fill(self._is_banned, -torch.inf).argmax())
            self.chosen = self.answers[best]
            self._context.append(own[best : best + 1])
            if self.chosen[-1] in self.ends or len(self.chosen) == self.limit:
                self.is_done = True
                return []
        scores = logits[best].float()
        found = scores.softmax(-1).topk(self.k)
        self._likely = found.values
        self._is_banned = scores[found.indices] == -torch.inf
        self.answers = [[*self.chosen, token] for token in found.indices.tolist()]
        return [best] * self.k

    def results(self) -> list[Hypothesis]:
        """The text."""
        return [Hypothesis(tuple(self.chosen))]
