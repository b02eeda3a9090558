"""Many requests at once: schedule, run, postprocess.

`N` places in texts that a step draws at, `E` model width, `V` vocabulary.
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.constraints import Constraints
from polyhead.generate.logprobs import logprobs_of
from polyhead.generate.memory import Memory
from polyhead.generate.mode import evaluating
from polyhead.generate.prompts import Prompt, encode_prompt
from polyhead.generate.request import Request, Text
from polyhead.generate.result import Generation
from polyhead.generate.rows_sampler import Sampler
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.sampling import row_seeds
from polyhead.generate.scheduler import Scheduler
from polyhead.generate.search import BeamSearch, advance
from polyhead.generate.search_config import SearchConfig
from polyhead.generate.speculative import Proposer
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

_LONGEST = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine does at once, and what it remembers it in."""

    max_rows: int = 16
    """Texts that go on together; beams and samples of one request count each."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held in all; None: `max_rows` texts as long as the model
    takes, or of 4096."""
    source_tokens: int | None = None
    """The same of what encoders read; None: as many."""
    block_size: int = 16
    """Tokens of a block."""
    chunk: int = 256
    """Tokens of prompts that a step reads while other texts go on."""
    idle_chunk: int = 4096
    """The same, while none does."""
    kv: str = "model"
    """Keys and values as the model computes them, or in "int8"."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "block_size", "chunk", "idle_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.cache_tokens is not None and self.cache_tokens < 2:
            raise ConfigError(f"cache_tokens={self.cache_tokens} must be 2 or more")
        if self.kv not in ("model", "int8"):
            raise ConfigError(f'kv={self.kv!r} must be "model" or "int8"')


class Engine:
    """One model and its requests: `step` moves all of them on, and nothing happens between steps.

    A request gives what it gives alone, whatever runs beside it: in float32 up to rounding, that
    is the same greedy tokens unless two are equally likely to the last bits.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        self.model, self.tokenizer, self.proposer = model, tokenizer, proposer
        self.config = config = config or EngineConfig()
        self.vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
        longest: int | None = getattr(model.config, "max_seq_len", None)
        tokens = config.cache_tokens or config.max_rows * min(longest or _LONGEST, _LONGEST)
        self.max_len = min(longest or tokens, tokens)
        self.memory = Memory(
            model.backbone, config.max_rows, self.max_len, tokens,
            block_size=config.block_size, kv=config.kv, source_tokens=config.source_tokens or tokens,
        )  # fmt: skip
        self.runner = Runner(model, self.memory)
        self.scheduler = Scheduler(self.memory, config.chunk, config.idle_chunk)
        self.sampler = Sampler(config.max_rows, self.max_len, self.vocab_size, model.device)
        self._numbers = itertools.count()
        self._ended: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, prompt: Prompt, config: GenerationConfig | None = None, **named: Any) -> Request:
        """Let a request wait for its turn; arguments and errors are those of `request`."""
        request = self.request(prompt, config, **named)
        self.enter(request)
        return request

    def enter(self, request: Request) -> None:
        """Let what `request` made wait for its turn."""
        if request.limit < 1:
            request.texts[0].finish_reason = "length"
            self._end(request)
        else:
            self.scheduler.add(request)

    def request(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        copies: int = 1,
        priority: int = 0,
        client: str = "",
        source: Sequence[int] = (),
        pixels: Tensor | None = None,
        ends: Collection[int] | None = None,
        seeds: Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Request:
        """A request, looked over; any thread may ask for one.

        copies: texts to draw from the one prompt. Of requests that wait, a higher `priority` goes
        first; within one, each `client` gets an equal share. source: what an encoder reads. pixels:
        `[N, C, height, width]` of the N images in the prompt. ends: the tokens that end a text, None:
        the tokenizer's and the config's. seeds: one a copy, in place of those
        that follow from the config and the prompt. on_text: gets each piece of the first
        text as it becomes certain. Errors: DataError for a prompt that does not fit the model or
        the cache, ConfigError for more copies than rows.
        """
        config = config or GenerationConfig()
        ids = encode_prompt(prompt, self.tokenizer, self.vocab_size)
        if pixels is not None:
            ids = self._with_room(ids)
        if copies > self.config.max_rows:
            raise ConfigError(
                f"{copies} texts at once are more than max_rows={self.config.max_rows}"
            )
        request = Request(
            prompt=ids, config=config, number=next(self._numbers), limit=self._limit(ids, config, copies),
            seeds=list(seeds or row_seeds([config] * copies, [ids] * copies, True)),
            ends=end_ids(self.tokenizer, config) if ends is None else frozenset(ends),
            priority=priority, client=client,
            source=list(source), pixels=pixels, salt=_salt(pixels), on_text=on_text,
        )  # fmt: skip
        if isinstance(config, SearchConfig) and config.num_beams > 1:
            request.search = BeamSearch(config, request.ends, request.limit)
        request.texts = [Text(request, 0, self.tokenizer)]
        return request

    def cancel(self, request: Request) -> None:
        """End a request as far as it came; its rows and blocks are free at once."""
        if not request.is_finished:
            self.scheduler.remove(request)
            for text in request.texts:
                text.finish_reason = "cancelled"
            self._end(request)

    def fail(self, error: Exception) -> None:
        """End what is at work with an error; what waits is not touched."""
        for request in list(self.scheduler.running):
            request.error = error
            self.scheduler.remove(request)
            self._end(request)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.has_work:
            self.step()

    def step(self) -> list[Request]:
        """Move on every request that can be moved; those that came to their end."""
        self._ended = []
        with evaluating(self.model), torch.inference_mode():
            self._propose()
            plan = self.scheduler.schedule()
            pieces = [_piece(text, count) for text, count in plan]
            found = self.runner.read(pieces)
            for piece in pieces:
                self._hold(piece.text, len(piece.ids) - len(piece.text.draft))
            if found:
                self._draw(found)
        return self._ended

    def _propose(self) -> None:
        """Let the proposer guess how the texts go on that can be guessed."""
        if self.proposer is None:
            return
        texts = [
            text
            for request in self.scheduler.running
            if request.search is None
            for text in request.texts
            if text.decodes and text.slot is not None
        ]
        for text, draft in zip(texts, self.proposer.propose(texts, self.sampler), strict=True):
            # What is read must fit, and one token more is always drawn.
            text.draft = draft[: text.request.limit - text.written - 1]

    def _hold(self, text: Text, count: int) -> None:
        """Count tokens of a text that were read."""
        assert text.row is not None
        before, text.held = text.held, text.held + count
        if self.memory.finds_prefixes:
            self.memory.remember(text.row, self.scheduler.keys(text), text.held, before)
        self.memory.leave_behind(text.row, text.held)

    def _draw(self, found: Sequence[tuple[Piece, Tensor]]) -> None:
        """Give every text that was read to its end its next token, and what agrees of its draft."""
        logits = self.runner.logits(torch.cat([states for _, states in found]))
        places: list[tuple[Text, int]] = []
        which: list[int] = []
        searching: dict[Request, list[tuple[Text, int]]] = {}
        start = 0
        for piece, states in found:
            request = piece.text.request
            if request.search is not None:
                searching.setdefault(request, []).append((piece.text, start))
            else:
                for text in self._open(piece.text):
                    places += [(text, text.written + i) for i in range(len(states))]
                    which += range(start, start + len(states))
            start += len(states)
        if searching:
            self._search(searching, logits)
        if not places:
            return
        if which != list(range(len(logits))):
            logits = logits[which]
        drawn = self.sampler(logits, [text.slot for text, _ in places], [n for _, n in places])
        top = max((text.request.config.logprobs or 0 for text, _ in places), default=0)
        wanted = any(text.request.config.logprobs is not None for text, _ in places)
        logprobs = logprobs_of(logits, drawn, top) if wanted else [None] * len(places)
        ids = drawn.tolist()
        at = 0
        while at < len(places):
            text = places[at][0]
            until = at + 1 + len(text.draft)
            self._take(text, ids[at:until], logprobs[at:until])
            at = until

    def _search(self, found: dict[Request, list[tuple[Text, int]]], logits: Tensor) -> None:
        """Move searches on, those of as many beams together."""
        alike: dict[int, list[Request]] = {}
        for request in found:
            alike.setdefault(len(request.search.answers), []).append(request)
        for num_beams, requests in alike.items():
            rows: list[int] = []
            for request in requests:
                place = dict(found[request])
                # All beams begin as the one text that read the prompt.
                own = [place[text] for text in request.texts]
                rows += own if len(own) == num_beams else own * num_beams
            logprobs = logits[rows].float().log_softmax(1)
            constraints = Constraints(requests[0].config, requests[0].ends)
            logprobs = constraints(
                logprobs,
                [request.prompt for request in requests for _ in range(num_beams)],
                [answer for request in requests for answer in request.search.answers],
            )
            searches = [request.search for request in requests]
            for request, parents in zip(requests, advance(searches, logprobs), strict=True):
                self._go_on(request, parents)

    def _go_on(self, request: Request, parents: Sequence[int]) -> None:
        """Let a search go on from these of its beams; those of one parent share what it holds."""
        search = request.search
        if search.is_done:
            self.scheduler.remove(request)
            self._end(request)
            return
        before, first = request.texts, len(request.texts) == 1
        parents = [0] * len(parents) if first else parents
        for number, text in enumerate(before):
            if number not in parents:
                self.scheduler.close(text)
        request.texts = []
        used: set[int] = set()
        for number, parent in enumerate(parents):
            text = before[parent]
            if parent in used:
                text = text.fork(number, self.memory)
            used.add(parent)
            request.texts.append(text)
        for number, (text, answer) in enumerate(zip(request.texts, search.answers, strict=True)):
            text.number, text.ids = number, [*request.prompt, *answer]
            text.keys = text.keys[: text.held // self.memory.block_size]
        self.scheduler.written(request, len(parents))

    def _open(self, text: Text) -> list[Text]:
        """The texts that draw where this one was read to its end, each with a slot."""
        request = text.request
        if text.slot is not None:
            if text.draft:
                self.sampler.write(text.slot, text.written, text.draft)
            return [text]
        others = [text.fork(number, self.memory) for number in range(1, len(request.seeds))]
        request.texts += others
        for each in (text, *others):
            each.slot = self.sampler.open(
                request.config, request.prompt, request.seeds[each.number], request.ends
            )
        return [text, *others]

    def _take(self, text: Text, ids: Sequence[int], logprobs: Sequence[object]) -> None:
        request, draft, before = text.request, text.draft, text.written
        for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            try:
                piece = text.take(token, logprob)
            except DataError as error:
                request.error = error
                self.scheduler.remove(request)
                self._end(request)
                return
            if piece and text.number == 0 and request.on_text is not None:
                request.on_text(piece)
            if text.finish_reason or place == len(draft) or token != draft[place]:
                break
        taken = list(ids[: place + 1])
        if self.proposer is not None and draft:
            self.proposer.observe(text, ids, place)
        self.scheduler.written(request, len(taken))
        text.draft = []
        self.sampler.write(text.slot, before, taken)
        self.sampler.accept(text.slot, taken)
        if place:
            self._hold(text, place)
        if draft:
            self.memory.cut(cast(int, text.row), text.held)
        if text.finish_reason:
            self._close(text)

    def _close(self, text: Text) -> None:
        """A text that is done gives back its row; the last one ends the request."""
        request = text.request
        if len(request.texts) == 1:
            self.scheduler.remove(request)
            self._end(request)
            return
        self.scheduler.close(text)
        self._forget(text)
        request.texts.remove(text)
        request.done.append(text)

    def _end(self, request: Request) -> None:
        self._ended.append(request)
        for text in request.texts:
            self._forget(text)
        request.done += request.texts
        request.texts = []
        if request.error is None:
            request.results = self._results(request)

    def _results(self, request: Request) -> list[Generation]:
        if request.search is None:
            return [text.result() for text in sorted(request.done, key=lambda text: text.number)]
        return [self._answer(request, *hypothesis) for hypothesis in request.search.results()]

    def _answer(self, request: Request, ids: tuple[int, ...], score: float) -> Generation:
        ended = ids[-1:] and ids[-1] in request.ends
        text = ""
        if self.tokenizer is not None:
            config = request.config
            shown = ids[:-1] if ended else ids
            text = self.tokenizer.decode(shown, skip_special_tokens=config.skip_special_tokens)
        reason = "stop" if ended else "length"
        return Generation(text, ids, None, reason, len(request.prompt), score)

    def _forget(self, text: Text) -> None:
        if self.proposer is not None:
            self.proposer.forget(text)
        if text.slot is not None:
            self.sampler.close(text.slot)
            text.slot = None

    def _with_room(self, prompt: list[int]) -> list[int]:
        """Each image token as often as an image has features."""
        if not isinstance(self.model.config, LlavaConfig):
            raise ConfigError(f"{self.model.config.model_type} reads no images; leave them out")
        return self.model.config.with_room(prompt)

    def _limit(self, prompt: Sequence[int], config: GenerationConfig, copies: int) -> int:
        """Tokens that may be written, so that the request fits the cache when it is alone."""
        longest: int | None = getattr(self.model.config, "max_seq_len", None)
        if longest is not None and len(prompt) > longest:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the model takes {longest}; shorten it"
            )
        room = self.memory.longest(len(prompt), copies)
        if len(prompt) > room:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the cache holds {room}; shorten it, or "
                "give the engine more cache_tokens"
            )
        return min(config.max_new_tokens, min(room, longest or room) - len(prompt))


def end_ids(tokenizer: Tokenizer | None, config: GenerationConfig) -> frozenset[int]:
    """The tokens that end a text."""
    ends: set[int] = set()
    if not config.ignore_eos:
        ends.update(config.stop_token_ids)
    if tokenizer is None:
        return frozenset(ends)
    if not config.ignore_eos:
        ends.update(tokenizer.eos_ids)
    # A stop string that is a special token would not show in a text that leaves those out.
    for stop in config.stop:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            ends.update(ids)
    return frozenset(ends)


def _piece(text: Text, count: int) -> Piece:
    end = text.held + count
    ids = [*text.ids[text.held : end], *text.draft]
    return Piece(text, ids, 1 + len(text.draft) if end == len(text.ids) else 0)


def _salt(pixels: Tensor | None) -> bytes:
    """What stands for the images where a text is looked for."""
    if pixels is None:
        return b""
    return blake2b(pixels.detach().cpu().float().contiguous().numpy().tobytes()).digest()
