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
from polyhead.kernels.decode import FEW, Ends


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

    def takes_ends(self, pieces: Sequence[Piece]) -> bool:
        """Whether of what may follow every token of these pieces all is known that is needed: when
        all are drawn from, of a few, or when all are beams."""
        requests = [text.request for text, _, _ in pieces]
        if not pieces or any(request.given for request in requests):
            return False
        if any(wanted != len(ids) for _, ids, wanted in pieces):
            return False
        searching = [request.search is not None for request in requests]
        if not any(searching):
            return len(pieces) <= FEW
        is_one_each = all(len(ids) == 1 for _, ids, _ in pieces)
        return all(searching) and is_one_each and not any(r.needs_states for r in requests)

    def take_ends(self, pieces: Sequence[Piece], ends: Ends) -> None:
        """The same for what may follow every token of these pieces."""
        if pieces[0].text.request.search is None:
            self.drawing.draw([(piece.text, piece.wanted) for piece in pieces], ends)
            return
        states: dict[Request, list[tuple[Text, Tensor]]] = {}
        for piece in pieces:
            states.setdefault(piece.text.request, [])
        read = Read({piece.text: row for row, piece in enumerate(pieces)}, ends.logits)
        self._go_on(states, read, [token >= 0 for token in ends.likeliest])

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
        are_numbers: list[bool] = []
        if ready:
            read.logits = self.runner.logits(torch.stack([last for _, last in ready]))
            are_numbers = read.logits.amax(1).isfinite().tolist()
        self._go_on(states, read, are_numbers)

    def _go_on(
        self,
        states: dict[Request, list[tuple[Text, Tensor]]],
        read: Read,
        are_numbers: Sequence[bool],
    ) -> None:
        """Searches by the states `[T, E]` that were read of each text, and by logits."""
        for text, good in zip(read.rows, are_numbers, strict=True):
            if not good and states.pop(text.request, None) is not None:
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
