"""Many requests at once: schedule, run, postprocess."""

from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, cast

import torch

from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.intake import Intake
from polyhead.generate.memory import Memory
from polyhead.generate.mode import evaluating
from polyhead.generate.postprocess import Postprocess
from polyhead.generate.prompts import Prompt
from polyhead.generate.request import Request, Text
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.speculative import Proposer
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

_PATIENCE = 0.05


class Engine:
    """One model and its requests: `step` moves all of them on, and nothing happens between steps.

    A request gives what it gives alone, whatever runs beside it: in float32 up to rounding, that
    is the same greedy tokens unless two are equally likely to the last bits. It belongs to one
    thread; `EngineThread` serves many.

    proposer: guesses how texts go on; it changes how fast they come, and nothing else.
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
        self.scheduler = Scheduler(self.memory, config.chunk, config.idle_chunk)
        self.runner = Runner(model, self.memory, config.static, config.compile)
        # Texts that were sent back keep their slots, and the last token drawn is not held.
        vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
        slots = 4 * config.max_rows
        self.sampler = Sampler(slots, most + 1, vocab_size, model.device, tokenizer)
        self.intake = Intake(model, tokenizer, self.memory, self.sampler, config)
        self.postprocess = Postprocess(self.runner, self.scheduler, self.sampler, proposer)

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
        """Let a request wait for its turn."""
        self.scheduler.add(request)
        if request.limit < 1:
            request.texts[0].finish_reason = "length"
            self.postprocess.end(request)

    def add(self, prompt: Prompt, config: GenerationConfig | None = None, **named: Any) -> Request:
        """`request`, and let it wait for its turn."""
        request = self.request(prompt, config, **named)
        self.enter(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request as far as it came; its rows and blocks are free at once."""
        if not request.is_finished:
            for text in request.texts:
                text.finish_reason = "cancelled"
            self.postprocess.end(request)

    def fail(self, error: Exception) -> None:
        """End what is at work with an error; what waits is not touched."""
        for request in list(self.scheduler.running):
            self.postprocess.fail(request, error)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.has_work:
            self.step()

    def step(self) -> list[Request]:
        """Move on every request that can be moved; those that came to their end since the last."""
        with evaluating(self.model), torch.inference_mode():
            self._propose()
            self._refuse()
            plan = self.scheduler.schedule()
            if not plan:
                self._wait()
            pieces = [_piece(text, count) for text, count in plan]
            found = self.runner.read(pieces)
            for piece in pieces:
                self.scheduler.hold(piece.text, len(piece.ids) - len(piece.text.draft))
            if found:
                self.postprocess(found)
        ended, self.postprocess.ended = self.postprocess.ended, []
        return ended

    def _refuse(self) -> None:
        """End those whose grammar turned out to be none."""
        for request in list(self.scheduler.waiting):
            if request.is_ready and request.compiled and (error := request.compiled.exception()):
                self.postprocess.fail(request, cast(Exception, error))

    def _wait(self) -> None:
        """Where nothing is left to do but for grammars that compile, wait for one a little."""
        compiling = [r.compiled for r in self.scheduler.waiting if r.compiled and not r.is_ready]
        assert compiling or not self.has_work, "no request can move"
        if compiling:
            wait(compiling, _PATIENCE, FIRST_COMPLETED)

    def _propose(self) -> None:
        """Let the proposer guess how those texts go on that can be guessed."""
        if self.proposer is None:
            return
        texts = [
            text
            for request in self.scheduler.running
            if request.search is None and request.config.speculates
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
    ids = [*text.ids[text.held : end], *text.draft]
    wanted = 1 + len(text.draft) if end == len(text.ids) else 0
    return Piece(text, ids, len(ids) if text.request.needs_states else wanted)
