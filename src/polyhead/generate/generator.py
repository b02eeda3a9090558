"""Text from a model and a tokenizer: prompts that go on together, and streams."""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import cast, overload

from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import BLOCK_SIZE, EngineConfig
from polyhead.generate.intake import copies_of, negative_ids, prompt_ids, rows_of
from polyhead.generate.prompts import Prompt
from polyhead.generate.request import Request
from polyhead.generate.result import Generation
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.speculative import Proposer
from polyhead.models.model import TaskModel, require_causal
from polyhead.text.tokenizer import Tokenizer

Stream = Generator[str, None, Generation]

_STATIC_STEP = 256
_ENDLESS = 1 << 20
_PROMPTS_AT_ONCE = 8192
"""Tokens of prompts in a step: nobody waits for the next token while a batch is read."""


class TextGenerator:
    """Generates with a causal language model, through an `Engine` that each call makes and drops.

    A row gives what it gives alone, whatever else is in its batch. Prompt and text together fill
    `max_seq_len` at most; there a row ends with finish_reason "length".

    static: a step of one token a row always has the same shapes. compile: and is compiled, which is
    worth its start-up for long work. proposer: guesses ahead (see `speculative`); the texts stay
    the same.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        *,
        static: bool = False,
        compile: bool = False,
        proposer: Proposer | None = None,
    ) -> None:
        require_causal(model)
        self.model, self.tokenizer, self.proposer = model, tokenizer, proposer
        self._shapes = EngineConfig(static=static or compile, compile=compile)
        self._kept: Engine | None = None

    @overload
    def generate(
        self, prompts: str, config: GenerationConfig | None = None, *, batch_size: int = 32
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        batch_size: int = 32,
        images: Sequence[Tensor | None] | None = None,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        batch_size: int = 32,
        images: Sequence[Tensor | None] | None = None,
    ) -> Generation | list[Generation]:
        """The text after each prompt: one `Generation` for a string, a list for a list.

        prompts: texts, or lists of token ids. config: one for all, or a list of one a prompt.
        Up to `batch_size` rows run together. images: for each prompt, the pixel values
        `[N, C, height, width]` of its N image tokens, or None. Errors: DataError for a prompt that
        is longer than the model, for ids out of range, and for logits that are not numbers.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")
        if not isinstance(prompts, Sequence):
            prompts = list(prompts)
        single = _is_one(prompts)
        wanted = cast(Sequence[Prompt], [prompts] if single else prompts)
        found = [
            results[0]
            for results in self.generate_all(wanted, config, batch_size=batch_size, images=images)
        ]
        return found[0] if single else found

    def generate_all(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        batch_size: int = 32,
        images: Sequence[Tensor | None] | None = None,
    ) -> list[list[Generation]]:
        """Every text of each prompt: as many as its config returns, a search's best first."""
        configs = _configs(prompts, config)
        pixels = [None] * len(prompts) if images is None else list(images)
        if len(pixels) != len(prompts):
            raise ConfigError(
                f"images for {len(pixels)} of {len(prompts)} prompts; give each its own"
            )
        ids = [
            prompt_ids(self.model, self.tokenizer, prompt, with_images=images is not None)
            for prompt in prompts
        ]
        engine = self._engine(ids, configs, batch_size)
        seeds = _seeds(configs, ids, not isinstance(config, Sequence))
        requests = [
            engine.request(prompt, own, pixels=images_of, seeds=some)
            for prompt, own, images_of, some in zip(ids, configs, pixels, seeds, strict=True)
        ]
        # What is of like length is read together.
        try:
            for request in sorted(requests, key=lambda request: len(request.prompt)):
                engine.enter(request)
            while engine.has_work:
                engine.step()
        finally:
            # Whoever broke this off may ask the same engine again.
            for request in requests:
                engine.cancel(request)
        return [request.outcome() for request in requests]

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        engine: Engine | None = None,
    ) -> Stream:
        """Pieces of the text as they become certain; joined, they are what `generate` gives.

        What a search finds, or the best of several, is known at the end, and comes in one piece.
        The generator's return value is the whole `Generation`. engine: one whose memory outlives
        the call, so that what it holds of the prompt is not read again. Errors as for `generate`.
        """
        config = config or GenerationConfig()
        ids = prompt_ids(self.model, self.tokenizer, prompt)
        engine = engine or self._engine([ids], [config], 1)
        (seeds,) = _seeds([config], [ids], True)
        # Of several texts the first is given, unless the best is wanted.
        request = engine.request(ids, config, seeds=seeds if config.best_of else seeds[:1])
        return _stream(engine, request)

    def own_engine(self, config: GenerationConfig | None = None) -> Engine:
        """An engine for one prompt at a time, as long as the model takes, that remembers the last.

        config: what its prompts will ask for.
        """
        settings = replace(self._shapes, max_rows=rows_of(config or GenerationConfig()))
        return Engine(self.model, self.tokenizer, settings, self.proposer)

    def _engine(
        self, prompts: Sequence[list[int]], configs: Sequence[GenerationConfig], at_once: int
    ) -> Engine:
        """One that holds `at_once` of these from beginning to end."""
        most: int | None = getattr(self.model.config, "max_seq_len", None)
        rows = [rows_of(config) for config in configs]
        vocab_size: int = getattr(self.model.config, "vocab_size")  # noqa: B009
        begun = [
            max(len(prompt), len(negative_ids(config, prompt, self.tokenizer, vocab_size)))
            for prompt, config in zip(prompts, configs, strict=True)
        ]
        lengths = [
            max(length, min(length + config.max_new_tokens, most or _ENDLESS))
            for length, config in zip(begun, configs, strict=True)
        ]
        if self._shapes.static:
            # Rounded up, so that one compiled step serves texts of many lengths.
            lengths = [-(-length // _STATIC_STEP) * _STATIC_STEP for length in lengths]
        needed = sorted(
            count * -(-length // BLOCK_SIZE) * BLOCK_SIZE
            for count, length in zip(rows, lengths, strict=True)
        )
        settings = replace(
            self._shapes, max_rows=sum(sorted(rows)[-at_once:]) or 1,
            cache_tokens=max(BLOCK_SIZE, sum(needed[-at_once:])), max_len=max(lengths, default=1),
            chunk=_PROMPTS_AT_ONCE, idle_chunk=_PROMPTS_AT_ONCE,
        )  # fmt: skip
        if self._kept is not None and settings.fits(self._kept.config):
            return self._kept
        engine = Engine(self.model, self.tokenizer, settings, self.proposer)
        if self._shapes.static:
            self._kept = engine
        return engine


def _stream(engine: Engine, request: Request) -> Stream:
    pieces: list[str] = []
    request.on_text = pieces.append
    engine.enter(request)
    try:
        while not request.is_finished:
            engine.step()
            text, pieces[:] = "".join(pieces), []
            if text:
                yield text
    finally:
        engine.cancel(request)
    return request.outcome()[0]


def _configs(
    prompts: Sequence[Prompt], config: GenerationConfig | Sequence[GenerationConfig] | None
) -> list[GenerationConfig]:
    if not isinstance(config, Sequence):
        return [config or GenerationConfig()] * len(prompts)
    if len(config) != len(prompts):
        raise ConfigError(f"{len(config)} configs for {len(prompts)} prompts; give one each")
    return list(config)


def _seeds(
    configs: Sequence[GenerationConfig], prompts: Sequence[Sequence[int]], shared: bool
) -> list[list[int]]:
    """Of every text of each prompt."""
    copies = [copies_of(config) for config in configs]
    if not shared:
        return [
            row_seeds([config] * count, [prompt] * count, True)
            for config, prompt, count in zip(configs, prompts, copies, strict=True)
        ]
    each = [i for i, count in enumerate(copies) for _ in range(count)]
    found = iter(row_seeds([configs[i] for i in each], [prompts[i] for i in each], True))
    return [list(islice(found, count)) for count in copies]


def _is_one(prompts: object) -> bool:
    """Whether this is one prompt: a string, or a list of ids."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
