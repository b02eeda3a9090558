"""Many requests at once: schedule, run, postprocess."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from time import perf_counter
from typing import Any, cast

import torch

from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.ending import Ending
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.intake import Intake
from polyhead.generate.memory import Memory
from polyhead.generate.pace import Pace
from polyhead.generate.postprocess import Postprocess
from polyhead.generate.prompts import Prompt, check_ids
from polyhead.generate.request import Request, Text
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler, num_read
from polyhead.generate.speculative import Proposer
from polyhead.kernels.seen import Seen
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

_PATIENCE = 0.05


class Engine:
    """One model and its requests: `step` moves all of them on, and nothing happens between steps.

    A request gives what it gives alone, whatever runs beside it: in float32 up to rounding, that
    is the same greedy tokens unless two are equally likely to the last bits. It belongs to one
    thread; `EngineThread` serves many.

    proposer: guesses how texts go on; it changes how fast they come, and nothing else. Errors:
    ConfigError for a recurrent model with one.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        config = config or EngineConfig()
        longest: int | None = getattr(model.config, "max_seq_len", None)
        tokens = config.tokens(longest)
        most = min(longest or tokens, config.max_len or tokens, tokens)
        self.model, self.config, self.proposer = model, config, proposer
        self.memory = Memory(
            model.backbone, config.max_rows, most, tokens, block_size=config.block_size,
            kv=config.kv, source_tokens=config.source_tokens or tokens,
            whole_prompts=isinstance(model.config, LlavaConfig),
        )  # fmt: skip
        if proposer is not None and self.memory.states:
            kind = model.config.model_type
            raise ConfigError(
                f"{kind} cannot go back to its state before a wrong guess; leave the proposer out"
            )
        self.scheduler = Scheduler(self.memory, config.idle_chunk)
        self.pace = Pace(config.stretch)
        self.runner = Runner(model, self.memory, config.static, config.compile)
        # Texts that were sent back keep their slots, and the last token drawn is not held.
        vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
        slots = 4 * config.max_rows
        self.sampler = Sampler(slots, most + 1, vocab_size, model.device, tokenizer)
        self.intake = Intake(model, tokenizer, self.memory, self.sampler, config)
        self._kind = model.dtype, model.device
        self._seen, self._looks = cast(Seen | None, None), 0
        self.ending = Ending(self.scheduler, self.sampler, proposer)
        self.postprocess = Postprocess(
            self.runner, self.scheduler, self.sampler, proposer, self.ending
        )

    def _look(self) -> None:
        """What is held of texts was computed by the model as it was then."""
        seen = Seen(self.model.backbone)
        if seen.is_what(self._seen):
            return
        if not self.is_of(self.model):
            raise ConfigError("the model was cast or moved since: make another engine of it")
        self._seen, self._looks = seen, self._looks + 1

    def prepare(self) -> None:
        """Get ready for steps before the first request comes, so that none waits for that, and
        equal ones are answered alike."""
        with torch.inference_mode():
            self.runner.prepare()

    def is_of(self, model: TaskModel) -> bool:
        """Whether it is this model's, as that is now."""
        return model is self.model and (model.dtype, model.device) == self._kind

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def request(
        self, prompt: Prompt, config: GenerationConfig | None = None, **named: Any
    ) -> Request:
        """A request that waits for nothing yet; see `Intake.request`. Any thread may ask."""
        return self.intake.request(prompt, config, **named)

    def enter(self, request: Request) -> None:
        """Let a request wait for its turn. Errors: ConfigError for one that came before."""
        if request.has_entered:
            raise ConfigError("this request was entered before; ask for another one")
        request.has_entered = True
        if not self.has_work:
            self._look()
        request.salt += self._looks.to_bytes(4)
        if request.is_finished:  # it was cancelled meanwhile
            return
        self.scheduler.add(request)
        if request.limit < 1:
            self._end_full(request)

    def add(self, prompt: Prompt, config: GenerationConfig | None = None, **named: Any) -> Request:
        """`request`, and let it wait for its turn."""
        request = self.request(prompt, config, **named)
        self.enter(request)
        return request

    def score(
        self, context: Prompt, continuations: Sequence[Sequence[int]], **named: Any
    ) -> Request:
        """A request for how likely the model holds each of these ids after the context, waiting.

        Its results are the continuations with their `logprobs`, and at each token's place the
        likeliest. What contexts share is read once, and a context once for all that follows it.
        Errors: DataError for ids that do not fit the model or the cache, ConfigError for more
        continuations than rows.
        """
        given = [list(ids) for ids in continuations]
        if not given:
            raise DataError("there is no continuation; give at least one")
        for number, ids in enumerate(given):
            if not ids:
                raise DataError(f"continuation {number} has no tokens; give it some text")
            check_ids(ids, self.intake.vocab_size)
        most = max(map(len, given))
        config = GenerationConfig(logprobs=1, max_new_tokens=most, num_return_sequences=len(given))
        request = self.request(context, config, ends=(), seeds=[0] * len(given), **named)
        # The last token is predicted, not read.
        if request.limit < most - 1:
            raise DataError(
                f"a context of {len(request.prompt)} tokens leaves room for {request.limit + 1} "
                f"and a continuation has {most}; shorten it, or give the engine more cache_tokens"
            )
        request.given, request.limit = given, most
        self.enter(request)
        return request

    def _end_full(self, request: Request) -> None:
        """Where the prompt leaves no room, every text is empty."""
        first = request.texts[0]
        others = range(1, len(request.seeds))
        request.texts += [Text(request, number, first.tokenizer) for number in others]
        for text in request.texts:
            text.finish_reason = "length"
        self.ending.end(request)

    def cancel(self, request: Request) -> None:
        """End a request, in whatever state, as far as it came; what it holds is free at once."""
        if not request.is_finished:
            for text in request.texts:
                text.finish_reason = "cancelled"
            self.ending.end(request)

    def fail(self, error: Exception) -> None:
        """End what is at work with an error; what waits is not touched, unless nothing else is."""
        for request in list(self.scheduler.running or self.scheduler.waiting):
            self.ending.fail(request, error)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.has_work:
            self.step()

    def step(self) -> list[Request]:
        """Move on every request that can be moved; those that came to their end since the last."""
        begin, is_busy = perf_counter(), self.scheduler.is_busy
        with torch.inference_mode():
            self._propose()
            self._refuse()
            plan = self._schedule()
            read = num_read(plan)
            if not plan:
                self._wait()
            pieces = [_piece(text, count) for text, count in plan]
            ends = self.runner.ends(pieces) if self.postprocess.takes_ends(pieces) else None
            found = self.runner.read(pieces) if ends is None else []
            for piece in pieces:
                self.scheduler.hold(piece.text, len(piece.ids) - len(piece.text.draft))
            if ends is not None:
                self.postprocess.take_ends(pieces, ends)
            elif found:
                self.postprocess(found)
        if is_busy and plan:
            self.pace.took(perf_counter() - begin, read)
        ended, self.ending.ended = self.ending.ended, []
        return ended

    def _schedule(self) -> list[tuple[Text, int]]:
        """What to read now. Where only prompts can move, they do."""
        chunk = self.config.chunk or self.pace.budget()
        return self.scheduler.schedule(chunk) or self.scheduler.schedule(max(1, chunk))

    def _refuse(self) -> None:
        """End those whose grammar turned out to be none."""
        for request in list(self.scheduler.waiting):
            if request.is_ready and request.compiled and (error := request.compiled.exception()):
                self.ending.fail(request, cast(Exception, error))

    def _wait(self) -> None:
        """Where nothing is left to do but for grammars that compile, wait for one a little."""
        compiling = [r.compiled for r in self.scheduler.waiting if r.compiled and not r.is_ready]
        assert compiling or not self.has_work, "no request can move"
        if compiling:
            wait(compiling, _PATIENCE, FIRST_COMPLETED)

    def _propose(self) -> None:
        """Let the proposer guess how those texts go on that can be guessed, and others be read as
        they are given."""
        self.postprocess.scoring.propose(self.config.idle_chunk)
        if self.proposer is None:
            return
        texts = [
            text
            for request in self.scheduler.running
            if request.search is None and request.config.speculates and not request.given
            for text in request.texts
            if text.slot is not None and all(each.decodes for each in text.both)
        ]
        for text, draft in zip(texts, self.proposer.propose(texts, self.sampler), strict=True):
            # One token more is drawn than is guessed.
            for each in text.both:
                each.draft = draft[: text.request.limit - text.written - 1]


def _piece(text: Text, count: int) -> Piece:
    """The next tokens of a text; the states of the last ones are wanted, or, by some, of all."""
    end = text.held + count
    if end < len(text.ids):
        text.draft = []
    ids = [*text.ids[text.held : end], *text.draft]
    wanted = 1 + len(text.draft) if end == len(text.ids) else 0
    # Where there are candidates, the states before them are known, also to one that was sent back.
    looks_at_all = text.request.needs_states and len(text.request.texts) == 1
    return Piece(text, ids, len(ids) if looks_at_all else wanted)
