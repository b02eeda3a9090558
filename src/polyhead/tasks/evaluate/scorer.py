"""How likely a model holds continuations of contexts; what contexts share is read once.

`B` rows, `G` contexts, `T` tokens, `E` model width, `V` vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.mode import evaluating
from polyhead.generate.prompts import check_ids, padded
from polyhead.generate.seq2seq import start_id
from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.model import TaskModel, require_causal
from polyhead.nn.cache import Caches
from polyhead.nn.mask import Mask
from polyhead.text.tokenizer import Tokenizer

MOST_TOKENS = 8192
"""That a batch holds, padding included; a single longer row is a batch of its own."""

_MOST_LOGITS = 1 << 24  # numbers held at once: 64 MB in float32
_LEAST_FILLED = 0.75  # of a batch's width, by each of its rows
_WORTH_SHARING = 16  # tokens that all contexts begin with


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

    most_tokens: of a batch, with its padding; it bounds the memory. start: what the decoder of an
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
        self.model, self.most_tokens, self.start = model, most_tokens, start

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
        scored: list[Scored | None] = [None] * len(rows)
        done = 0
        with evaluating(self.model), torch.inference_mode():
            for found in self._batches(rows):
                for place, tokens, is_greedy in found:
                    cut = len(requests[place].context) - len(rows[place].context)
                    scored[place] = Scored(tokens, is_greedy, cut)
                done += len(found)
                if progress is not None:
                    progress(done, len(rows))
        return cast(list[Scored], scored)

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

    def _batches(self, rows: Sequence[Request]) -> "Iterator[list[_Found]]":
        groups = _groups(rows, self.most_tokens)
        if self.is_encoder_decoder:
            for batch in _within(groups, self.most_tokens):
                yield self._translated(batch)
            return
        shared = _shared(groups)
        first = self._read_once(groups[0].context[:shared]) if shared else None
        single = [group for group in groups if first is None and len(group.members) == 1]
        for batch in _within(single, self.most_tokens):
            yield self._in_one(batch)
        branching = groups if first is not None else [g for g in groups if len(g.members) > 1]
        for batch in _within(branching, self.most_tokens):
            yield self._branched(batch, first, shared)

    def _in_one(self, batch: "list[_Group]") -> "list[_Found]":
        """Contexts of one continuation each: both are read together, and nothing is kept."""
        rows = [[*g.context, *g.members[0][1][:-1]] for g in batch]
        ids, _ = padded(rows, self.model.device)
        hidden = self.model.backbone(ids)  # what is padded stands where no causal row can see it
        members = [group.members[0] for group in batch]
        starts = [len(group.context) - 1 for group in batch]
        return self._found(hidden, members, starts)

    def _branched(self, batch: "list[_Group]", first: Caches | None, shared: int) -> "list[_Found]":
        """Contexts are read over caches, which each of their continuations goes on from."""
        backbone: Any = self.model.backbone
        count = len(batch)
        caches = backbone.make_caches(count) if first is None else _forked(first, [0] * count)
        ids, keep = padded([group.context[shared:] for group in batch], self.model.device)
        mask = None if bool(keep.all()) else keep
        hidden = backbone(ids, attention_mask=mask, caches=caches)
        owners = [row for row, group in enumerate(batch) for _ in group.members]
        members = [member for group in batch for member in group.members]
        # What follows the context's last token is the first that is asked.
        hidden = hidden[torch.arange(count, device=ids.device), keep.sum(1) - 1][owners]
        most = max(len(ids) for _, ids in members)
        states = hidden.new_zeros(len(members), most, hidden.shape[1])
        states[:, 0] = hidden
        for rows in _alike([len(ids) - 1 for _, ids in members]):
            branches = _forked(caches, [owners[row] for row in rows])
            ids, keep = padded([members[row][1][:-1] for row in rows], self.model.device)
            mask = None if bool(keep.all()) else keep
            states[rows, 1 : 1 + ids.shape[1]] = backbone(ids, attention_mask=mask, caches=branches)
        return self._found(states, members, [0] * len(members))

    def _translated(self, batch: "list[_Group]") -> "list[_Found]":
        """Each source is encoded once for all of its continuations."""
        assert self.start is not None
        backbone = cast(EncoderDecoder, self.model.backbone)
        ids, keep = padded([group.context for group in batch], self.model.device)
        memory = backbone.encode(ids, Mask() if bool(keep.all()) else Mask(keep=keep))
        owners = [row for row, group in enumerate(batch) for _ in group.members]
        members = [member for group in batch for member in group.members]
        read, _ = padded([[self.start, *ids[:-1]] for _, ids in members], self.model.device)
        hidden = backbone.decode(read, memory[owners], Mask(keep=keep[owners]))
        return self._found(hidden, members, [0] * len(members))

    def _read_once(self, ids: Sequence[int]) -> Caches:
        backbone: Any = self.model.backbone
        caches: Caches = backbone.make_caches(1)
        backbone(torch.tensor([ids], device=self.model.device), caches=caches)
        return caches

    def _found(
        self, hidden: Tensor, members: "Sequence[_Member]", starts: Sequence[int]
    ) -> "list[_Found]":
        """Of each continuation its tokens' log-probabilities, which the states of its row
        `[B, T, E]` predict from `starts` on."""
        lengths = [len(ids) for _, ids in members]
        row = [r for r, length in enumerate(lengths) for _ in range(length)]
        column = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)]
        targets = torch.tensor([i for _, ids in members for i in ids], device=hidden.device)
        states = hidden[row, column]
        logprobs: list[float] = []
        greedy: list[bool] = []
        at_once = max(_MOST_LOGITS // getattr(self.model.config, "vocab_size"), 1)  # noqa: B009
        for some, wanted in zip(states.split(at_once), targets.split(at_once), strict=True):
            logits = cast(Any, self.model.head)(some).float()
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logprobs += (chosen - logits.logsumexp(1)).tolist()
            greedy += (logits.argmax(1) == wanted).tolist()
        if any(value != value for value in logprobs):
            raise DataError(
                "the model's logits are not finite; load it with dtype=torch.float32, or check its "
                "weights"
            )
        found: list[_Found] = []
        end = 0
        for (place, _), length in zip(members, lengths, strict=True):
            start, end = end, end + length
            found.append((place, tuple(logprobs[start:end]), all(greedy[start:end])))
        return found


_Member = tuple[int, Sequence[int]]  # a request's place, and its continuation
_Found = tuple[int, tuple[float, ...], bool]  # a request's place, log-probabilities, is_greedy


class _Group(NamedTuple):
    """A context and everything that is to follow it."""

    context: Sequence[int]
    members: list[_Member]

    @property
    def width(self) -> int:
        """Tokens of its longest row."""
        return len(self.context) + max(len(ids) for _, ids in self.members)


def _groups(rows: Sequence[Request], most_tokens: int) -> list[_Group]:
    """Requests by their context, those of like length beside each other, the longest first.

    A context with more continuations than fit a batch comes several times.
    """
    places = sorted(range(len(rows)), key=lambda place: rows[place].context)
    groups: list[_Group] = []
    for context, some in groupby(places, key=lambda place: rows[place].context):
        whole = _Group(context, [(place, rows[place].continuation) for place in some])
        at_once = max(1, most_tokens // whole.width)
        starts = range(0, len(whole.members), at_once)
        groups += [_Group(context, whole.members[start : start + at_once]) for start in starts]
    return sorted(groups, key=lambda group: -group.width)


def _shared(groups: Sequence[_Group]) -> int:
    """Tokens that all of several contexts begin with, if reading them once is worth it.

    At least the last token of each is left to read.
    """
    if len(groups) < 2:
        return 0
    # What the first and the last in order share, all between them share.
    low, high = min(g.context for g in groups), max(g.context for g in groups)
    most = min(len(group.context) for group in groups) - 1
    same = 0
    while same < most and low[same] == high[same]:
        same += 1
    return same if same >= _WORTH_SHARING else 0


def _within(groups: Sequence[_Group], most_tokens: int) -> Iterator[list[_Group]]:
    """Groups of falling width together, as many as fit, and none that is mostly padding."""
    batch: list[_Group] = []
    rows = 0
    for group in groups:
        full = bool(batch) and (rows + len(group.members)) * batch[0].width > most_tokens
        if full or (batch and group.width < _LEAST_FILLED * batch[0].width):
            yield batch
            batch, rows = [], 0
        batch.append(group)
        rows += len(group.members)
    if batch:
        yield batch


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows whose lengths differ by less than a factor of two; those of length 0 are left out."""
    order = sorted((row for row in range(len(lengths)) if lengths[row]), key=lengths.__getitem__)
    for _, rows in groupby(order, key=lambda row: lengths[row].bit_length()):
        yield list(rows)


def _forked(caches: Caches, rows: Sequence[int]) -> Caches:
    """Caches of their own that go on from these rows; the old ones stay as they are."""
    other = copy.copy(caches)
    other.layers = [copy.copy(layer) for layer in caches.layers]
    other.select(rows)
    return other
