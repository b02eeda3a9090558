"""Searches at work: which of a request's texts go on, and with what.

`R` requests, `n` texts of each, `E` model width, `V` vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.contrastive import ContrastiveSearch
from polyhead.generate.request import Request, Text
from polyhead.generate.rows_sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.search import BeamSearch, DiverseBeams, Search, advance

MakeSearch = Callable[[Collection[int], int], Search]


def search_of(config: GenerationConfig) -> tuple[MakeSearch | None, int]:
    """What makes the search that a config asks for, from end tokens and a limit, and its rows."""
    if config.penalty_alpha:
        return partial(ContrastiveSearch, config.top_k, config.penalty_alpha), config.top_k
    if config.num_beam_groups > 1:
        return partial(DiverseBeams, config), config.num_beams
    if config.num_beams > 1:
        return partial(BeamSearch, config), config.num_beams
    return None, 1


class Searching:
    """Moves searches on. Their texts fork by reference: what two of them hold is held once."""

    def __init__(self, scheduler: Scheduler, sampler: Sampler) -> None:
        self.scheduler, self.sampler = scheduler, sampler

    def advance(
        self, found: dict[Request, list[tuple[Text, Tensor]]], logits: dict[Text, Tensor]
    ) -> list[Request]:
        """One token for every text of these requests; the requests whose search is done.

        found: the states `[T, E]` that were read of each text; logits `[V]` after each that was
        read to its end.
        """
        beams: dict[int, list[Request]] = {}
        for request, states in found.items():
            search = request.search
            if isinstance(search, ContrastiveSearch):
                self._contrast(request, search, states, logits)
            elif isinstance(search, DiverseBeams):
                scores = self._logprobs([request], len(search.answers), logits)
                self._go_on(request, search.advance(scores))
            else:
                beams.setdefault(len(request.search.answers), []).append(request)
        for num_beams, requests in beams.items():
            scores = self._logprobs(requests, num_beams, logits)
            searches = [request.search for request in requests]
            for request, parents in zip(requests, advance(searches, scores), strict=True):
                self._go_on(request, parents)
        return [request for request in found if request.search.is_done]
