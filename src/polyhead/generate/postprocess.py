"""What a step's logits come to: tokens drawn, searches moved on, texts and requests ended.

`N` places in texts that a step draws at, `E` model width, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import cast

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.generate.request import Request, Text
from polyhead.generate.result import Generation, TokenLogprob
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling.guidance import guide
from polyhead.generate.sampling.logprobs import token_logprobs
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.scoring import Scoring, not_finite
from polyhead.generate.searching import Searching
from polyhead.generate.speculative import Proposer


class Postprocess:
    """`ended`: the requests that came to their end since somebody emptied it."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        proposer: Proposer | None,
    ) -> None:
        self.runner, self.scheduler, self.sampler = runner, scheduler, sampler
        self.proposer = proposer
        self.searching = Searching(scheduler, sampler)
        self.scoring = Scoring(runner, scheduler)
        self.ended: list[Request] = []

    def __call__(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        """Give every text that was read to its end its next token, and what agrees of its draft.

        found: pieces, and the states `[wanted, E]` of the last tokens of each.
        """
        for way in (self._draw, self._score, self._search):
            # Whoever heard of a text may have cancelled others.
            some = [each for each in found if not each[0].text.request.is_finished]
            if some := [each for each in some if self._way(each[0].text.request) == way]:
                way(some)

    def _way(self, request: Request) -> Callable[[Sequence[tuple[Piece, Tensor]]], None]:
        """What becomes of a request's states."""
        if request.given:
            return self._score
        return self._draw if request.search is None else self._search

    def _draw(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        logits = self.runner.logits(torch.cat([states for _, states in found]))
        rows_of: dict[Text, range] = {}
        start = 0
        for piece, states in found:
            rows_of[piece.text] = range(start, start + len(states))
            start += len(states)
        texts: list[Text] = []
        places: list[int] = []
        rows: list[int] = []
        away: dict[int, int] = {}  # of a place, the row that its companion read
        for own, its_rows in rows_of.items():
            if own.is_companion:
                continue
            for text in self._open(own):
                if own.companion is not None:
                    away |= zip(count(len(texts)), rows_of[own.companion], strict=False)
                texts += [text] * len(its_rows)
                places += range(text.written, text.written + len(its_rows))
                rows += its_rows
        scores, logits = _guided(logits, rows, away, texts)
        drawn = self.sampler(scores, [cast(int, text.slot) for text in texts], places)
        logprobs = _logprobs(texts, logits, drawn)
        ids, at = drawn.tolist(), 0
        are_numbers = logits.amax(1).isfinite().tolist() if min(ids) < 0 else ()
        while at < len(texts):
            text, until = texts[at], at + 1 + len(texts[at].draft)
            if ids[at] < 0 and not text.request.is_finished:
                self.fail(text.request, self._no_token(text, are_numbers[at]))
            self._take(text, ids[at:until], logprobs[at:until])
            at = until

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
        """Add what was drawn at each place of a text's draft, as far as the draft agrees."""
        request, draft, before = text.request, text.draft, text.written
        kept = 0
        for token, logprob in zip(ids, logprobs, strict=True):
            if request.is_finished:  # by an error of another text, or by whoever heard of this one
                return
            if token < 0:
                kept -= 1  # whether the text goes on after what it has is the next step's to say
                break
            self._tell(text, text.take(token, logprob))
            if text.finish_reason or kept == len(draft) or token != draft[kept]:
                break
            kept += 1
        if request.is_finished:
            return
        slot = cast(int, text.slot)
        self.sampler.write(slot, before, ids[: kept + 1])
        self.sampler.accept(slot, ids[: kept + 1])
        self.scheduler.written(request, kept + 1)
        # Without a token that ends a text, only the grammar knows that it is over.
        if request.config.is_formal and not request.ends and self.sampler.is_complete(slot):
            self._tell(text, text.finish("stop"))
        for each in text.both:
            each.draft = []
            self.scheduler.hold(each, kept)
            if draft:
                self.scheduler.memory.cut(cast(int, each.row), each.held)
        if draft and self.proposer is not None:
            self.proposer.observe(text, ids, kept)
        if text.finish_reason:
            self._done(text)

    def _tell(self, text: Text, piece: str) -> None:
        request = text.request
        if text.number == 0 and not request.is_chosen_late:
            self._hand_over(request, piece)

    def _hand_over(self, request: Request, piece: str) -> None:
        if not piece or request.on_text is None:
            return
        try:
            request.on_text(piece)
        # Others are not to suffer from what one reader does.
        except Exception as error:
            if request.is_finished:
                request.error = error
            else:
                self.fail(request, error)

    def _no_token(self, text: Text, are_numbers: bool) -> DataError:
        if not are_numbers:
            return not_finite(len(text.ids))
        return DataError(
            self.sampler.problem(cast(int, text.slot))
            or f"nothing is left to write after {len(text.ids)} tokens; forbid less, or use "
            "smaller biases and penalties"
        )

    def _score(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        done, broken = self.scoring(found)
        for text in done:
            self._done(text)
        for request in broken:
            self.fail(request, not_finite(len(request.prompt)))

    def _search(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        states: dict[Request, list[tuple[Text, Tensor]]] = {}
        ready: list[tuple[Text, Tensor]] = []
        for piece, some in found:
            text = piece.text
            states.setdefault(text.request, []).append((text, some))
            if text.unread == 0:
                ready.append((text, some[-1]))
        logits: dict[Text, Tensor] = {}
        if ready:
            rows = self.runner.logits(torch.stack([last for _, last in ready]))
            logits = {text: row for (text, _), row in zip(ready, rows, strict=True)}
            are_numbers = rows.amax(1).isfinite().tolist()
            for text, good in zip(logits, are_numbers, strict=True):
                if not good and states.pop(text.request, None):
                    self.fail(text.request, self._no_token(text, are_numbers=False))
        for request in self.searching.advance(states, logits):
            if request.search is not None and request.search.results():
                self.end(request)
            else:
                self.fail(request, _no_text(request))

    def _done(self, text: Text) -> None:
        """A text gives back what it holds; the last one ends its request."""
        request = text.request
        if len(request.texts) == len(text.both):
            self.end(request)
            return
        for each in text.both:
            self._close(each)
            request.texts.remove(each)
        request.done.append(text)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        request.error = error
        self.end(request)

    def end(self, request: Request) -> None:
        """End a request as far as it came; all it holds is free at once."""
        if request.has_entered:
            self.scheduler.remove(request)
        for text in request.texts:
            self._close(text)
        request.done += [text for text in request.texts if not text.is_companion]
        request.texts = []
        if request.error is None:
            request.results = self._results(request)
        self.ended.append(request)
        if request.results and request.is_chosen_late:
            self._hand_over(request, str(request.results[0]))

    def _close(self, text: Text) -> None:
        self.searching.close(text)
        if self.proposer is not None:
            self.proposer.forget(text)

    def _results(self, request: Request) -> list[Generation]:
        config, texts = request.config, sorted(request.done, key=lambda text: text.number)
        if request.search is not None:
            best = request.search.results()[: config.num_return_sequences]
            return [self._answer(request, *hypothesis) for hypothesis in best]
        if config.best_of is None:
            return [text.result() for text in texts]
        found = [text.result(text.logprob / max(1, text.written)) for text in texts]
        found.sort(key=lambda result: -(result.score or 0))
        return found[: config.num_return_sequences]

    def _answer(self, request: Request, ids: Sequence[int], score: float) -> Generation:
        """What a search wrote, as a text."""
        text = Text(request, 0, request.done[0].tokenizer)
        for token in ids:
            if not text.finish_reason:
                text.take(token)
        text.finish_reason = text.finish_reason or request.done[0].finish_reason or "length"
        return text.result(score)


def _guided(
    logits: Tensor, rows: Sequence[int], away: dict[int, int], texts: Sequence[Text]
) -> tuple[Tensor, Tensor]:
    """What is drawn from at each place, and the model's own logits there.

    rows: of `logits`, for each place; away: for some, the row to be led away from.
    """
    own = logits if rows == [*range(len(logits))] else logits[rows]
    if not away:
        return own, own
    scales = [texts[place].request.config.guidance_scale for place in away]
    places = torch.tensor(list(away), device=own.device)
    guided = guide(
        own[places].float(), logits[list(away.values())].float(),
        torch.tensor(scales, device=own.device),
    )  # fmt: skip
    return own.float().index_copy(0, places, guided), own


def _no_text(request: Request) -> DataError:
    return DataError(
        f"no text of {request.limit} tokens or fewer was found that holds force_words_ids; give "
        "more max_new_tokens or num_beams, or allow what the words need"
    )


def _logprobs(
    texts: Sequence[Text], logits: Tensor, drawn: Tensor
) -> Sequence[TokenLogprob | None]:
    """Of what was drawn, if any of the texts asks for it."""
    configs = [text.request.config for text in texts]
    if all(config.logprobs is None and config.best_of is None for config in configs):
        return [None] * len(texts)
    return token_logprobs(logits, drawn, max(config.logprobs or 0 for config in configs))
