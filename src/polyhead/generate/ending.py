"""How requests end: what they hold is given back, and readers are told what came of them."""

from collections.abc import Sequence

from polyhead.generate.request import Request, Text
from polyhead.generate.result import Generation
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.speculative import Proposer


class Ending:
    """`ended`: the requests that came to their end since somebody emptied it."""

    def __init__(self, scheduler: Scheduler, sampler: Sampler, proposer: Proposer | None) -> None:
        self.scheduler, self.sampler, self.proposer = scheduler, sampler, proposer
        self.ended: list[Request] = []

    def finish(self, text: Text) -> None:
        """A text is done and gives back what it holds; the last one ends its request."""
        request = text.request
        if len(request.texts) == len(text.both):
            self.end(request)
            return
        for each in text.both:
            self.close(each)
            request.texts.remove(each)
        request.done.append(text)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error."""
        request.error = error
        self.end(request)

    def end(self, request: Request) -> None:
        """End a request as far as it came; all it holds is free at once."""
        self.scheduler.remove(request)
        for text in request.texts:
            self.close(text)
        request.done += [text for text in request.texts if not text.is_companion]
        request.texts = []
        if request.error is None:
            request.results = _results(request)
        self.ended.append(request)
        if request.results and request.is_chosen_late:
            self.tell(request, str(request.results[0]))

    def close(self, text: Text) -> None:
        """Give back what a text holds."""
        self.scheduler.close(text)
        if text.slot is not None:
            self.sampler.close(text.slot)
            text.slot = None
        if self.proposer is not None:
            self.proposer.forget(text)

    def tell(self, request: Request, piece: str) -> None:
        """Hand a piece of the first result to whoever reads it; what that raises ends the request
        alone."""
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


def _results(request: Request) -> list[Generation]:
    config, texts = request.config, sorted(request.done, key=lambda text: text.number)
    if request.search is not None:
        best = request.search.results()[: config.num_return_sequences]
        return [_answer(request, *hypothesis) for hypothesis in best]
    if config.best_of is None:
        return [text.result() for text in texts]
    found = [text.result(text.logprob / max(1, text.written)) for text in texts]
    found.sort(key=lambda result: -(result.score or 0))
    return found[: config.num_return_sequences]


def _answer(request: Request, ids: Sequence[int], score: float) -> Generation:
    """What a search wrote, as a text."""
    text = Text(request, 0, request.done[0].tokenizer)
    for token in ids:
        if not text.finish_reason:
            text.take(token)
    text.finish_reason = text.finish_reason or request.done[0].finish_reason or "length"
    return text.result(score)
