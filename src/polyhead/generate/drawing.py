"""From states to tokens: what is drawn at each place of a step, and how texts take it.

`N` places in texts that a step draws at, `E` model width, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.generate.ending import Ending
from polyhead.generate.request import Text
from polyhead.generate.result import TokenLogprob
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling.guidance import guide
from polyhead.generate.sampling.logprobs import token_logprobs
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.scoring import not_finite
from polyhead.generate.speculative import Proposer
from polyhead.kernels.decode import Ends


class Drawing:
    """Gives every text that was read to its end its next token, and what agrees of its draft."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        proposer: Proposer | None,
        ending: Ending,
    ) -> None:
        self.runner, self.scheduler, self.sampler = runner, scheduler, sampler
        self.proposer, self.ending = proposer, ending

    def __call__(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        """Draw from the states `[wanted, E]` of these pieces."""
        logits = self.runner.logits(torch.cat([states for _, states in found]))
        self.draw([(piece.text, len(states)) for piece, states in found], Ends(logits, []))

    def draw(self, read: Sequence[tuple[Text, int]], ends: Ends) -> None:
        """Draw what follows the last so many tokens of each of these texts."""
        if ends.likeliest and self._takes_likeliest(read):
            for (text, _), token in zip(read, ends.likeliest, strict=True):
                if text.request.is_finished:
                    continue
                if token < 0:
                    self.ending.fail(text.request, not_finite(len(text.ids)))
                self._take(text, (token,), (None,))
            return
        places = self._places(read)
        texts, slots = places.texts, [cast(int, text.slot) for text in places.texts]
        scores, logits = _guided(ends.logits, places)
        drawn = self.sampler(scores, slots, places.written)
        logprobs = _logprobs(texts, logits, drawn)
        ids, at = drawn.tolist(), 0
        are_numbers = logits.amax(1).isfinite().tolist() if min(ids) < 0 else ()
        while at < len(texts):
            text, until = texts[at], at + 1 + len(texts[at].draft)
            if ids[at] < 0 and not text.request.is_finished:
                self.ending.fail(text.request, self._no_token(text, are_numbers[at]))
            self._take(text, ids[at:until], logprobs[at:until])
            at = until

    def _takes_likeliest(self, read: Sequence[tuple[Text, int]]) -> bool:
        """Whether each text goes on by its likeliest token, and nothing else is asked for."""
        slots: list[int] = []
        for text, count in read:
            if count != 1 or text.slot is None or text.companion is not None:
                return False
            slots.append(text.slot)
        return self.sampler.takes_likeliest(slots)

    def _places(self, read: Sequence[tuple[Text, int]]) -> "_Places":
        """One after each token that was read, for every text that goes on from there."""
        rows_of: dict[Text, range] = {}
        start = 0
        for text, count in read:
            rows_of[text] = range(start, start + count)
            start += count
        places = _Places()
        for own, rows in rows_of.items():
            if own.is_companion:
                continue
            for text in self._open(own):
                if own.companion is not None:
                    first = len(places.texts)
                    numbers = range(first, first + len(rows))
                    places.away |= zip(numbers, rows_of[own.companion], strict=True)
                places.texts += [text] * len(rows)
                places.written += range(text.written, text.written + len(rows))
                places.rows += rows
        return places

    def _open(self, text: Text) -> list[Text]:
        """The texts that draw where this one was read to its end, each with a slot."""
        request = text.request
        if text.slot is not None:
            if text.draft:
                self.sampler.write(text.slot, text.written, text.draft)
            return [text]
        memory = self.scheduler.memory
        others = [text.fork(number, memory) for number in range(1, len(request.seeds))]
        request.texts += [each for other in others for each in other.both]
        for each, seed in zip((text, *others), request.seeds, strict=True):
            each.slot = self.sampler.open(request.config, request.prompt, seed, request.ends)
        return [text, *others]

    def _take(
        self, text: Text, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> None:
        """Go on by what was drawn at each place of a text's draft."""
        request, draft, before = text.request, text.draft, text.written
        count = self._write(text, ids, logprobs)
        if request.is_finished:  # by an error of another text, or by whoever heard of this one
            return
        slot = cast(int, text.slot)
        self.sampler.write(slot, before, ids[:count])
        self.sampler.accept(slot, ids[:count])
        self.scheduler.written(request, count)
        # Without a token that ends a text, only the grammar knows that it is over.
        if request.config.is_formal and not request.ends and self.sampler.is_complete(slot):
            self._tell(text, text.finish("stop"))
            if request.is_finished:  # the last piece was too much for whoever heard it
                return
        for each in text.both:
            each.draft = []
            self.scheduler.hold(each, count - 1)
            if draft:
                self.scheduler.memory.cut(cast(int, each.row), each.held)
        if draft and self.proposer is not None:
            self.proposer.observe(text, ids, count - 1)
        if text.finish_reason:
            self.ending.finish(text)

    def _write(
        self, text: Text, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> int:
        """Add tokens to a text as far as its draft agrees, and one more; how many these are."""
        count = 0
        for token, logprob in zip(ids, logprobs, strict=True):
            # Whether it goes on where nothing could be drawn is the next step's to say.
            if token < 0 or text.request.is_finished:
                break
            self._tell(text, text.take(token, logprob))
            count += 1
            if text.finish_reason or text.draft[count - 1 : count] != [token]:
                break
        return count

    def _tell(self, text: Text, piece: str) -> None:
        if text.number == 0 and not text.request.is_chosen_late:
            self.ending.tell(text.request, piece)

    def _no_token(self, text: Text, are_numbers: bool) -> DataError:
        if not are_numbers:
            return not_finite(len(text.ids))
        return DataError(
            self.sampler.problem(cast(int, text.slot))
            or f"nothing is left to write after {len(text.ids)} tokens; forbid less, or use "
            "smaller biases and penalties"
        )


@dataclass
class _Places:
    """Of each place: its text, the number of the token there, and its row of the logits read.

    away: of some places, the row that their text's companion read.
    """

    texts: list[Text] = field(default_factory=list[Text])
    written: list[int] = field(default_factory=list[int])
    rows: list[int] = field(default_factory=list[int])
    away: dict[int, int] = field(default_factory=dict[int, int])


def _guided(logits: Tensor, places: _Places) -> tuple[Tensor, Tensor]:
    """What is drawn from at each place, and the model's own logits there, `[N, V]` both."""
    rows, away = places.rows, places.away
    own = logits if rows == [*range(logits.shape[0])] else logits[rows]
    if not away:
        return own, own
    scales = [places.texts[place].request.config.guidance_scale for place in away]
    led = torch.tensor(list(away), device=own.device)
    guided = guide(
        own[led].float(), logits[list(away.values())].float(),
        torch.tensor(scales, device=own.device),
    )  # fmt: skip
    return own.float().index_copy(0, led, guided), own


def _logprobs(
    texts: Sequence[Text], logits: Tensor, drawn: Tensor
) -> Sequence[TokenLogprob | None]:
    """Of what was drawn, if any of the texts asks for it."""
    configs = [text.request.config for text in texts]
    if all(config.logprobs is None and config.best_of is None for config in configs):
        return [None] * len(texts)
    return token_logprobs(logits, drawn, max(config.logprobs or 0 for config in configs))
