"""How likely a model holds continuations of contexts; what contexts share is read once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, cast

from polyhead.errors import ConfigError, DataError
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.prompts import check_ids
from polyhead.generate.request import Request as EngineRequest
from polyhead.generate.result import Generation
from polyhead.generate.seq2seq import start_id
from polyhead.models.model import TaskModel, require_causal
from polyhead.text.tokenizer import Tokenizer

MOST_TOKENS = 8192
"""That are read at once, and held; a single longer request is held alone."""

_MOST_ROWS = 128
_BLOCK_SIZE = 8  # what contexts share is found by whole blocks


class Request(NamedTuple):
    """Ids of a continuation, whose likelihood is asked, after those of a context."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True)
class Scored:
    """Natural log-probabilities of a continuation's tokens, one after the other.

    is_greedy: each of them is the model's most likely. cut: tokens of the context that the model
    had no room for, from its beginning.
    """

    tokens: tuple[float, ...]
    is_greedy: bool
    cut: int = 0

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(self.tokens)


class Scorer:
    """Log-probabilities of continuations: `Scorer(model).logprobs([Request(context, ids), ...])`.

    A request gives what it gives alone. The start that all contexts share is read once, and a
    context once for all its continuations. Of an encoder-decoder the context is the source.

    most_tokens: read at once, and held; it bounds the memory. start: what the decoder of an
    encoder-decoder begins with; None: as the checkpoint, or else the tokenizer, says.
    Errors: ConfigError for a model that writes no texts.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer | None = None,
        *,
        most_tokens: int = MOST_TOKENS,
        start: int | None = None,
    ) -> None:
        if most_tokens < 1:
            raise ConfigError(f"most_tokens is {most_tokens}; it must be at least 1")
        self.is_encoder_decoder = getattr(model.config, "kind", "decoder") == "encoder-decoder"
        if not self.is_encoder_decoder or model.head_kind != "lm":
            require_causal(model)
        elif start is None and (start := start_id(model, tokenizer)) is None:
            raise ConfigError("nothing says what the decoder begins with; give start=")
        self.model, self.most_tokens = model, most_tokens
        self.start = start if self.is_encoder_decoder else None

    def logprobs(
        self,
        requests: Sequence[Request],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Scored]:
        """What the model gives each request, in their order.

        A context that does not fit loses its beginning. progress: called with the requests that
        are done, and with all. Errors: DataError for an empty context or continuation, ids out of
        range, a continuation longer than the model, and logits that are not numbers.
        """
        rows = [self._fitted(number, request) for number, request in enumerate(requests)]
        groups = _groups(rows, self.most_tokens)
        if not groups:
            return []
        engine = Engine(self.model, None, self._size(groups))
        groups_of = {self._ask(engine, group): group for group in groups}
        scored: list[Scored | None] = [None] * len(rows)
        done = 0
        while engine.has_work:
            ended = engine.step()
            for asked in ended:
                for place, found in zip(groups_of[asked].places, asked.outcome(), strict=True):
                    cut = len(requests[place].context) - len(rows[place].context)
                    scored[place] = _scored(found, cut)
                    done += 1
            if progress is not None and ended:
                progress(done, len(rows))
        return cast(list[Scored], scored)

    def _ask(self, engine: Engine, group: "_Group") -> EngineRequest:
        if self.start is None:
            return engine.score(group.context, group.continuations)
        return engine.score([self.start], group.continuations, source=group.context)

    def _size(self, groups: "Sequence[_Group]") -> EngineConfig:
        """Room for as many at once as `most_tokens` says, and for the largest of all."""
        rows = [len(group.continuations) for group in groups]
        widths = [group.width if self.start is None else group.longest + 1 for group in groups]
        # A row of its own for each continuation, and what is copied when it leaves the others.
        blocks = max(n * (2 + width // _BLOCK_SIZE) for n, width in zip(rows, widths, strict=True))
        # Rows that were sent back hold a source each.
        sources = max(
            n * (1 + len(group.context) // _BLOCK_SIZE)
            for n, group in zip(rows, groups, strict=True)
        )
        read = sum(
            len(group.context) + n * group.longest for n, group in zip(rows, groups, strict=True)
        )
        at_once = min(self.most_tokens * sum(rows) // read, _MOST_ROWS)
        return EngineConfig(
            max_rows=max(at_once, *rows, 1), chunk=self.most_tokens, idle_chunk=self.most_tokens,
            cache_tokens=max(min(self.most_tokens, read), _BLOCK_SIZE * blocks),
            block_size=_BLOCK_SIZE,
            source_tokens=max(self.most_tokens, _BLOCK_SIZE * sources),
        )  # fmt: skip

    def _fitted(self, number: int, request: Request) -> Request:
        """The end of the context that the model has room for, checked."""
        context, continuation = tuple(request.context), tuple(request.continuation)
        for ids, what in ((context, "context"), (continuation, "continuation")):
            if not ids:
                raise DataError(f"the {what} of request {number} has no tokens; give it some text")
            check_ids(ids, getattr(self.model.config, "vocab_size"))  # noqa: B009
        most: int | None = self.model.config.max_tokens
        if most is None:
            return Request(context, continuation)
        # The last token is predicted, not read.
        if len(continuation) > most:
            raise DataError(
                f"the continuation of request {number} has {len(continuation)} tokens and the "
                f"model takes {most}; shorten it"
            )
        room = most if self.is_encoder_decoder else most - len(continuation) + 1
        return Request(context[-room:], continuation)


@dataclass(frozen=True, slots=True)
class _Group:
    """A context and what is to follow it, with the requests' places."""

    context: Sequence[int]
    continuations: list[Sequence[int]]
    places: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest continuation."""
        return max(map(len, self.continuations))

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return len(self.context) + self.longest


def _groups(rows: Sequence[Request], most_tokens: int) -> list[_Group]:
    """Requests by their context, the longest first; one with more continuations than fit comes
    several times."""

    def context_of(place: int) -> tuple[int, ...]:
        return tuple(rows[place].context)

    groups: list[_Group] = []
    for context, found in groupby(sorted(range(len(rows)), key=context_of), key=context_of):
        places = list(found)
        whole = _Group(context, [rows[place].continuation for place in places], places)
        size = max(1, min(most_tokens // whole.width, _MOST_ROWS))
        for start in range(0, len(places), size):
            some = slice(start, start + size)
            groups.append(_Group(context, whole.continuations[some], places[some]))
    return sorted(groups, key=lambda group: -group.width)


def _scored(found: Generation, cut: int) -> Scored:
    assert found.logprobs is not None
    is_greedy = all(token.top[0][0] == token.token_id for token in found.logprobs)
    return Scored(tuple(token.logprob for token in found.logprobs), is_greedy, cut)
