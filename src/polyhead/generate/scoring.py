"""Texts that are given, not drawn: how likely the model holds each token, many texts at once.

`N` states that a step scores from, `E` model width, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.generate.request import Request, Text
from polyhead.generate.result import TokenLogprob
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.scheduler import Scheduler

_MOST_LOGITS = 1 << 24  # numbers held at once: 64 MB in float32


class Scoring:
    """Scores what a request's `given` continuations say where a step has read.

    A context is read as any prompt is; then each continuation goes on from it, by reference, and is
    read at once, as a draft that is right.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.vocab_size: int = getattr(runner.model.config, "vocab_size")  # noqa: B009

    def propose(self, room: int) -> None:
        """Let texts read what is given next: about `room` tokens in all."""
        most = self.scheduler.memory.most_at_once - 1
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            if room <= 0:
                return
            # Before there are several texts, what is read belongs to all of them.
            if not request.given or (len(request.given) > 1 and not request.has_forked):
                continue
            for text in request.texts:
                # The last token is predicted, not read.
                some = text.given[text.written : -1]
                text.draft = some[: max(0, min(most, room) - text.unread + 1)]
                room -= len(text.draft) + text.unread

    def __call__(self, found: Sequence[tuple[Piece, Tensor]]) -> tuple[list[Text], list[Request]]:
        """Score the tokens that follow each state `[wanted, E]`; the texts that are done, and the
        requests whose logits are no numbers."""
        texts: list[tuple[Text, int]] = []
        rows: list[int] = []
        wanted: list[int] = []
        start = 0
        for piece, states in found:
            for text in self._open(piece.text):
                some = text.given[text.written : text.written + len(states)]
                rows += range(start, start + len(some))
                wanted += some
                texts.append((text, len(some)))
            start += len(states)
        scores = self._scores(torch.cat([states for _, states in found]), rows, wanted)
        done: list[Text] = []
        broken: dict[Request, None] = {}
        at = 0
        for text, count in texts:
            some, at = scores[at : at + count], at + count
            if any(score.logprob != score.logprob for score in some):
                broken[text.request] = None
            elif self._take(text, some):
                done.append(text)
        return [text for text in done if text.request not in broken], list(broken)

    def _open(self, text: Text) -> list[Text]:
        """The texts that go on where this one was read to; those that say one token need no row."""
        request = text.request
        if request.has_forked or len(request.given) == 1:
            return [text]
        request.has_forked = True
        others = [
            text.fork(number, self.scheduler.memory)
            if len(request.given[number]) > 1
            else Text(request, number, None)
            for number in range(1, len(request.given))
        ]
        request.texts += others
        return [text, *others]

    def _scores(self, states: Tensor, rows: list[int], wanted: list[int]) -> list[TokenLogprob]:
        """Of the tokens `wanted` after the states `[N, E]` in these rows, and of the likeliest."""
        order = sorted(range(len(rows)), key=rows.__getitem__)
        at, targets = (torch.tensor([x[i] for i in order]) for x in (rows, wanted))
        found: list[tuple[int, float, int, float]] = []
        size = max(_MOST_LOGITS // self.vocab_size, 1)
        for first in range(0, len(states), size):
            logits = self.runner.logits(states[first : first + size]).float()
            total, (best, likeliest) = logits.logsumexp(1), logits.max(1)
            low, high = torch.searchsorted(at, torch.tensor([first, first + size])).tolist()
            row, target = ((x[low:high]).to(logits.device) for x in (at - first, targets))
            chosen = (logits[row, target] - total[row]).tolist()
            tops = likeliest[row].tolist(), (best - total)[row].tolist()
            found += zip(target.tolist(), chosen, *tops, strict=True)
        scores = [TokenLogprob(0, 0.0, ())] * len(rows)
        for place, (token, logprob, likeliest, best) in zip(order, found, strict=True):
            scores[place] = TokenLogprob(token, logprob, ((likeliest, best),))
        return scores

    def _take(self, text: Text, scores: Sequence[TokenLogprob]) -> bool:
        """Add what was scored; whether nothing is left to score."""
        text.ids += [score.token_id for score in scores]
        text.logprobs += scores
        self.scheduler.had[text.request.client] += len(scores)
        if text.written == len(text.given):
            text.finish_reason = "stop"
            return True
        read, text.draft = len(text.draft), []
        self.scheduler.hold(text, read)
        return False


def not_finite(text_length: int) -> DataError:
    """The error of logits that are no numbers."""
    return DataError(
        f"the model's logits are not finite after {text_length} tokens; load it with "
        "dtype=torch.float32, or check its weights"
    )
