"""What is asked of the engine, and how far it has come."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.contrastive import ContrastiveSearch
from polyhead.generate.memory import Memory
from polyhead.generate.result import Generation, TokenLogprob
from polyhead.generate.search import Search
from polyhead.generate.writer import TextWriter
from polyhead.text.tokenizer import Tokenizer


class Text:
    """One text at work: its tokens, how many of them are held in memory, and what came of it.

    prompt: None is the request's.
    """

    def __init__(
        self,
        request: "Request",
        number: int,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int] | None = None,
    ) -> None:
        self.request, self.number, self.tokenizer = request, number, tokenizer
        self.prompt = request.prompt if prompt is None else prompt
        config = request.config
        self.writer = None
        if tokenizer is not None:
            self.writer = TextWriter(
                tokenizer, config.stop, config.min_new_tokens, config.skip_special_tokens
            )
        self.companion: Text | None = None
        self.is_companion = False
        self.ids = list(self.prompt)
        self.held = 0
        self.row: int | None = None  # in memory
        self.slot: int | None = None  # in the sampler
        self.keys: list[bytes] = []
        self.draft: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.logprob = 0.0  # of all that was written, where it is asked for
        self.finish_reason = ""

    @property
    def given(self) -> list[int]:
        """What it says, where that is scored and not drawn."""
        return self.request.given[self.number]

    @property
    def written(self) -> int:
        """Tokens drawn so far."""
        return len(self.ids) - len(self.prompt)

    @property
    def both(self) -> list["Text"]:
        """It and its companion, if it has one."""
        return [self] if self.companion is None else [self, self.companion]

    @property
    def unread(self) -> int:
        """Tokens that are not in memory: one, while it decodes."""
        return len(self.ids) - self.held

    def take(self, token_id: int, logprob: TokenLogprob | None = None) -> str:
        """Add a token that was drawn; returns the text it made certain."""
        config, writer = self.request.config, self.writer
        for each in self.both:
            each.ids.append(token_id)
        if logprob is not None:
            self.logprob += logprob.logprob
        if logprob is not None and config.logprobs is not None:
            self.logprobs.append(logprob._replace(top=logprob.top[: config.logprobs]))
        piece = ""
        if token_id in self.request.ends:
            self.finish_reason = "stop"
        else:
            piece = writer.push(token_id) if writer else ""
            if writer and writer.stopped:
                self.finish_reason = "stop"
            elif self.written >= self.request.limit:
                self.finish_reason = "length"
        if self.finish_reason and writer:
            piece += writer.flush()
            if writer.stopped:
                self.finish_reason = "stop"
        if piece:
            self.pieces.append(piece)
        return piece

    def finish(self, reason: str) -> str:
        """End here; returns the text that was still uncertain."""
        self.finish_reason = reason
        piece = self.writer.flush() if self.writer else ""
        if piece:
            self.pieces.append(piece)
        return piece

    def accompanied(self, prompt: Sequence[int]) -> "Text":
        """A text that reads another prompt and then what this one writes: its logits guide it."""
        companion = Text(self.request, self.number, None, prompt)
        companion.is_companion = True
        self.companion = companion
        return companion

    def fork(self, number: int, memory: Memory) -> "Text":
        """A text that goes its own way from here, before it has written anything to be read."""
        other = Text(self.request, number, self.tokenizer, self.prompt)
        other.is_companion = self.is_companion
        if self.companion is not None:
            other.companion = self.companion.fork(number, memory)
        other.ids, other.held, other.keys = list(self.ids), self.held, list(self.keys)
        assert self.row is not None
        other.row = memory.fork(self.row)
        return other

    def result(self, score: float | None = None) -> Generation:
        """What it came to."""
        prompt, wants = self.request.prompt, self.request.config.logprobs is not None
        return Generation(
            "".join(self.pieces), self.ids[len(prompt) :], self.logprobs if wants else None,
            self.finish_reason, len(prompt), score,
        )  # fmt: skip

    @property
    def decodes(self) -> bool:
        """Whether one token more gives the next."""
        return self.row is not None and self.unread == 1


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it.

    priority: a higher one goes first. client: whose it is; of one priority, clients get equal
    shares. source: ids for an encoder. pixels: `[N, C, height, width]` of the N images in the
    prompt. on_text: called with each piece of the first result as it becomes certain: of a search,
    or of the best of several, with all of it at the end. What it raises ends the request.
    """

    prompt: list[int]
    config: GenerationConfig
    seeds: list[int]
    number: int
    limit: int
    """Tokens that may be written."""
    ends: frozenset[int] = frozenset()
    priority: int = 0
    client: str = ""
    source: list[int] = field(default_factory=list[int])
    pixels: Tensor | None = None
    images: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Where in the prompt each image begins and ends."""
    salt: bytes = b""
    on_text: Callable[[str], None] | None = None
    search: Search | None = None
    compiled: Future[Any] | None = None
    """Its grammar, on the way."""
    given: list[list[int]] = field(default_factory=list[list[int]])
    """What its texts say, one a seed, where they are scored and not drawn."""
    has_forked: bool = field(default=False, init=False)
    """Whether each of them has begun."""

    texts: list[Text] = field(default_factory=list[Text], init=False)
    done: list[Text] = field(default_factory=list[Text], init=False)
    results: list[Generation] | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    has_entered: bool = field(default=False, init=False)
    """Whether an engine has been told to see to it."""
    found: int = field(default=0, init=False)
    """Tokens of the prompt that were in memory already."""
    times_preempted: int = field(default=0, init=False)

    @property
    def is_finished(self) -> bool:
        """Whether it has results, or an error."""
        return self.results is not None or self.error is not None

    def outcome(self) -> list[Generation]:
        """Its texts, or the error that it ended with, raised."""
        if self.error is not None:
            raise self.error
        return self.results or []

    @property
    def is_chosen_late(self) -> bool:
        """Whether only the end tells which text is the first result."""
        return self.search is not None or self.config.best_of is not None

    @property
    def needs_states(self) -> bool:
        """Whether every token's state is looked at, so that none may be found in memory alone."""
        return isinstance(self.search, ContrastiveSearch)

    @property
    def moves_together(self) -> bool:
        """Whether none of its texts goes on before all of them can."""
        return self.search is not None or self.config.is_guided

    @property
    def is_ready(self) -> bool:
        """Whether nothing is waited for but a turn."""
        return self.compiled is None or self.compiled.done()

    @property
    def rows_wanted(self) -> int:
        """Rows that it takes, now or once its prompt is read."""
        if self.search is not None:
            return max(len(self.texts), len(self.search.answers))
        has_begun = bool(self.done) or any(text.slot is not None for text in self.texts)
        return len(self.texts) if has_begun else len(self.texts) * len(self.seeds)
