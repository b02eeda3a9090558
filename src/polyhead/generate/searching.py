"""Searches at work: which of a request's texts go on, and with what.

`R` requests, `n` texts of each, `E` model width, `V` vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.contrastive import ContrastiveSearch
from polyhead.generate.ending import Ending
from polyhead.generate.forced import ForcedBeams
from polyhead.generate.request import Request, Text
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.search import BeamSearch, DiverseBeams, Search, advance, choose, num_wanted
from polyhead.kernels.best import best

MakeSearch = Callable[[Collection[int], int], Search]


def search_of(config: GenerationConfig) -> MakeSearch | None:
    """What makes the search that a config asks for, from end tokens and a limit, if any."""
    if config.penalty_alpha:
        return partial(ContrastiveSearch, config.top_k, config.penalty_alpha)
    if config.force_words_ids:
        return partial(ForcedBeams, config)
    if config.num_beam_groups > 1:
        return partial(DiverseBeams, config)
    return partial(BeamSearch, config) if config.num_beams > 1 else None


@dataclass
class Read:
    """Logits `[N, V]` after the texts that were read to their ends, and which row is whose."""

    rows: dict[Text, int]
    logits: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def of(self, texts: Sequence[Text]) -> Tensor:
        """Logits `[n, V]` after these."""
        rows = [self.rows[text] for text in texts]
        return self.logits if rows == [*range(len(self.logits))] else self.logits[rows]


class Searching:
    """Moves searches on. Their texts fork by reference: what two of them hold is held once."""

    def __init__(self, scheduler: Scheduler, sampler: Sampler, ending: Ending) -> None:
        self.scheduler, self.sampler, self.ending = scheduler, sampler, ending

    def advance(self, found: dict[Request, list[tuple[Text, Tensor]]], read: Read) -> list[Request]:
        """One token for every text of these requests; the requests whose search is done.

        found: the states `[T, E]` that were read of each text.
        """
        beams: dict[int, list[Request]] = {}
        for request, states in found.items():
            search = request.search
            if isinstance(search, ContrastiveSearch):
                self._contrast(request, search, states, read)
            elif isinstance(search, DiverseBeams | ForcedBeams):
                scores = self._scores([request], len(search.answers), read)
                self._go_on(request, search.advance(scores))
            elif search is not None:
                beams.setdefault(len(search.answers), []).append(request)
        for num_beams, requests in beams.items():
            searches = [cast(BeamSearch, request.search) for request in requests]
            chosen = self._chosen(requests, searches, num_beams, read)
            for request, parents in zip(requests, chosen, strict=True):
                self._go_on(request, parents)
        return [request for request in found if request.search and request.search.is_done]

    def _contrast(
        self,
        request: Request,
        search: ContrastiveSearch,
        states: Sequence[tuple[Text, Tensor]],
        read: Read,
    ) -> None:
        if len(request.texts) == 1 and not search.answers[0]:
            search.read(states[0][1])
            if request.texts[0] not in read.rows:
                return
            seen = None
        else:
            by_text = dict(states)
            seen = torch.cat([by_text[text] for text in request.texts])
        scores = self._scores([request], len(request.texts), read)
        self._go_on(request, search.advance(seen, scores))

    def _chosen(
        self,
        requests: Sequence[Request],
        searches: Sequence[BeamSearch],
        num_beams: int,
        read: Read,
    ) -> list[list[int]]:
        """The beams that each of these searches goes on from."""
        texts = self._texts(requests, num_beams)
        if self.sampler.constrains([cast(int, text.slot) for text in texts]):
            return advance(searches, self._scores(requests, num_beams, read))
        logits = read.of(texts).float()
        count = min(num_wanted(searches), logits.shape[1])
        return choose(searches, *best(logits, count))

    def _scores(self, requests: Sequence[Request], num_rows: int, read: Read) -> Tensor:
        """Log-probabilities `[R * n, V]` after constraints; of a first text, as often as asked."""
        texts = self._texts(requests, num_rows)
        logprobs = read.of(texts).float().log_softmax(1)
        slots = [cast(int, text.slot) for text in texts]
        return self.sampler.constrain(logprobs, slots, [text.written for text in texts])

    def _texts(self, requests: Sequence[Request], num_rows: int) -> list[Text]:
        """The texts of these, a first one as often as asked, each with its slot."""
        texts: list[Text] = []
        for request in requests:
            own = request.texts
            texts += own if len(own) == num_rows else own * num_rows
        for text in texts:
            if text.slot is None:
                request = text.request
                text.slot = self.sampler.open(
                    request.config, request.prompt, request.seeds[0], request.ends
                )
        return texts

    def _go_on(self, request: Request, parents: Sequence[int]) -> None:
        """Let texts go on from these of the request's; those of one parent share what it holds."""
        if request.search is None or request.search.is_done:
            return
        before = request.texts
        if len(before) == 1:
            parents = [0] * len(parents)
        for number, text in enumerate(before):
            if number not in parents:
                self.ending.close(text)
        texts: list[Text] = []
        for number, parent in enumerate(parents):
            text = before[parent]
            if parent in parents[:number]:
                text = self._forked(text, number)
            texts.append(text)
        for number, (text, answer) in enumerate(zip(texts, request.search.answers, strict=True)):
            text.number = number
            text.ids.append(answer[-1])
            del text.keys[text.held // self.scheduler.memory.block_size :]
            self.sampler.write(cast(int, text.slot), len(answer) - 1, answer[-1:])
            self.sampler.accept(cast(int, text.slot), answer[-1:])
        request.texts = texts
        self.scheduler.written(request, len(texts))

    def _forked(self, text: Text, number: int) -> Text:
        other = text.fork(number, self.scheduler.memory)
        other.slot = self.sampler.fork(cast(int, text.slot))
        return other
