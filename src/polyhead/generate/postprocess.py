"""What a step's states come to: drawn from, scored, or searched on, as their request asks.

`E` model width, `V` vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.generate.drawing import Drawing
from polyhead.generate.ending import Ending
from polyhead.generate.request import Request, Text
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.scoring import Scoring, not_finite
from polyhead.generate.searching import Read, Searching
from polyhead.generate.speculative import Proposer


class Postprocess:
    """Moves every text on that was read, and ends those that came to their end by it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        proposer: Proposer | None,
        ending: Ending,
    ) -> None:
        self.runner, self.ending = runner, ending
        self.drawing = Drawing(runner, scheduler, sampler, proposer, ending)
        self.scoring = Scoring(runner, scheduler)
        self.searching = Searching(scheduler, sampler, ending)

    def __call__(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        """found: pieces, and the states `[wanted, E]` of the last tokens of each."""
        for way in (self.drawing, self._score, self._search):
            # Whoever heard of a text may have cancelled others.
            some = [each for each in found if not each[0].text.request.is_finished]
            if some := [each for each in some if self._way(each[0].text.request) == way]:
                way(some)

    def draws_all(self, pieces: Sequence[Piece]) -> bool:
        """Whether something is drawn after every token of these pieces, and nothing else done."""
        for text, ids, wanted in pieces:
            request = text.request
            if wanted != len(ids) or request.search is not None or request.given:
                return False
        return bool(pieces)

    def _way(self, request: Request) -> Callable[[Sequence[tuple[Piece, Tensor]]], None]:
        """What becomes of a request's states."""
        if request.given:
            return self._score
        return self.drawing if request.search is None else self._search

    def _score(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        done, broken = self.scoring(found)
        for text in done:
            self.ending.finish(text)
        for request in broken:
            self.ending.fail(request, not_finite(len(request.prompt)))

    def _search(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        states: dict[Request, list[tuple[Text, Tensor]]] = {}
        ready: list[tuple[Text, Tensor]] = []
        for piece, some in found:
            text = piece.text
            states.setdefault(text.request, []).append((text, some))
            if text.unread == 0:
                ready.append((text, some[-1]))
        read = Read({text: row for row, (text, _) in enumerate(ready)})
        if ready:
            read.logits = self.runner.logits(torch.stack([last for _, last in ready]))
            are_numbers = read.logits.amax(1).isfinite().tolist()
            for text, good in zip(read.rows, are_numbers, strict=True):
                if not good and states.pop(text.request, None):
                    self.ending.fail(text.request, not_finite(len(text.ids)))
        for request in self.searching.advance(states, read):
            if request.search is not None and request.search.results():
                self.ending.end(request)
            else:
                self.ending.fail(request, _no_text(request))


def _no_text(request: Request) -> DataError:
    return DataError(
        f"no text of {request.limit} tokens or fewer was found that holds force_words_ids; give "
        "more max_new_tokens or num_beams, or allow what the words need"
    )
