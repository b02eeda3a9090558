"""Text from a model and a tokenizer: batches of prompts that decode together, and streams.

`B` rows, `T` tokens, `V` tokens of the vocabulary.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import cast, overload

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.mode import evaluating
from polyhead.generate.prefix import PrefixCache
from polyhead.generate.prompts import Prompt, encode_prompt
from polyhead.generate.result import Generation, TokenLogprob
from polyhead.generate.sampling.logprobs import token_logprobs
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.writer import TextWriter
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.model import TaskModel, require_causal
from polyhead.nn.cache import Caches
from polyhead.text.tokenizer import Tokenizer

_STATIC_STEP = 256

Stream = Generator[str, None, Generation]


class TextGenerator:
    """Generates with a causal language model; keeps nothing between calls.

    A row gives what it gives alone, whatever else is in its batch. Prompt and text together fill
    `max_seq_len` at most; there a row ends with finish_reason "length".

    static: caches of fixed size, so that a decode step always has the same shapes.
    compile: decode through one compiled step, over static caches; worth its start-up for long work.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        *,
        static: bool = False,
        compile: bool = False,
    ) -> None:
        require_causal(model)
        self.model, self.tokenizer = model, tokenizer
        self.static = static or compile
        self._step = torch.compile(self._logits, dynamic=False) if compile else self._logits

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
        prompts: Prompt | list[str] | list[list[int]],
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
        rows = self._rows(wanted, config, images)
        by_length = sorted(rows, key=lambda row: len(row.prompt))
        with evaluating(self.model):
            for start in range(0, len(rows), batch_size):
                for _ in self._decode(by_length[start : start + batch_size]):
                    pass
        results = [row.result() for row in rows]
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        prefix: PrefixCache | None = None,
    ) -> Stream:
        """Pieces of the text as they become certain; joined, they are what `generate` gives.

        The generator's return value is the whole `Generation`. prefix: computes only what it does
        not hold already, and leaves there what this call adds. Errors as for `generate`.
        """
        (row,) = self._rows([prompt], config)
        return self._stream(row, prefix)

    def _stream(self, row: "_Row", prefix: PrefixCache | None) -> Stream:
        caches = None
        if prefix is not None:
            caches = prefix.take(row.prompt) or self._make_caches(1, None)
        try:
            with evaluating(self.model):
                for (piece,) in self._decode([row], caches):
                    if piece:
                        yield piece
        finally:
            if prefix is not None and caches is not None:
                prefix.put(caches, row.prompt + row.ids)
        return row.result()

    def _rows(
        self,
        prompts: Sequence[Prompt],
        config: GenerationConfig | Sequence[GenerationConfig] | None,
        images: Sequence[Tensor | None] | None = None,
    ) -> list["_Row"]:
        shared = not isinstance(config, Sequence)
        if not isinstance(config, Sequence):
            configs = [config or GenerationConfig()] * len(prompts)
        else:
            configs = list(config)
        if len(configs) != len(prompts):
            raise ConfigError(f"{len(configs)} configs for {len(prompts)} prompts; give one each")
        vocab_size = getattr(self.model.config, "vocab_size")  # noqa: B009
        ids = [encode_prompt(prompt, self.tokenizer, vocab_size) for prompt in prompts]
        pixels = [None] * len(ids) if images is None else list(images)
        if len(pixels) != len(ids):
            raise ConfigError(f"images for {len(pixels)} of {len(ids)} prompts; give each its own")
        if images is not None:
            ids = [self._with_room(prompt) for prompt in ids]
        room = [self._room(prompt) for prompt in ids]
        seeds = row_seeds(configs, ids, shared)
        return [
            _Row(self.tokenizer, *each)
            for each in zip(ids, configs, seeds, room, pixels, strict=True)
        ]

    def _with_room(self, prompt: list[int]) -> list[int]:
        """Each image token as often as an image has features."""
        if not isinstance(self.model.config, LlavaConfig):
            raise ConfigError(f"{self.model.config.model_type} reads no images; leave them out")
        return self.model.config.with_room(prompt)

    def _room(self, prompt: Sequence[int]) -> int | None:
        most = getattr(self.model.config, "max_seq_len", None)
        if most is None:
            return None
        if len(prompt) > most:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and the model takes {most}; shorten it"
            )
        return most - len(prompt)

    def _decode(self, rows: list["_Row"], caches: Caches | None = None) -> Iterator[list[str]]:
        """Step until every row is done; after each step, the text it made certain in each row.

        caches: what they hold is the start of the (only) row's prompt.
        """
        rows = [row for row in rows if not row.done]
        if not rows:
            return
        steps = max(row.limit for row in rows)
        most = max(len(row.prompt) for row in rows) + steps
        vocab_size = getattr(self.model.config, "vocab_size")  # noqa: B009
        sampler = Sampler(len(rows), most, vocab_size, self.model.device, self.tokenizer)
        slots = [sampler.open(row.config, row.prompt, row.seed, row.ends) for row in rows]
        top = max(
            (c.logprobs for row in rows if (c := row.config).logprobs is not None), default=-1
        )
        # The mode is entered anew at each step: between two steps the caller's own code runs.
        with torch.inference_mode():
            if caches is None:
                caches = self._make_caches(len(rows), most if self.static else None)
            logits = self._prefill(rows, caches)
        while True:
            with torch.inference_mode():
                drawn = sampler(logits, slots, [len(row.ids) for row in rows])
                ids = drawn.tolist()
                logprobs = token_logprobs(logits, drawn, top) if top >= 0 else [None] * len(rows)
            was_done = [row.done for row in rows]
            for slot, row, token in zip(slots, rows, ids, strict=True):
                if not row.done:
                    _tell(sampler, slot, row, token)
            yield [row.take(i, p) for row, i, p in zip(rows, ids, logprobs, strict=True)]
            if all(row.done for row in rows):
                return
            with torch.inference_mode():
                ended = [r for r, row in enumerate(rows) if row.done and not was_done[r]]
                if ended:
                    _start_over(caches, ended)
                logits = self._step(drawn.clamp(min=0)[:, None], caches)

    def _make_caches(self, batch: int, most: int | None) -> Caches:
        """Static for at least `most` tokens a row, or growing."""
        if most is not None:
            # Rounded up, so that one compiled step serves texts of many lengths.
            most = -(-most // _STATIC_STEP) * _STATIC_STEP
        make = cast(Callable[[int, int | None], Caches], self.model.backbone.make_caches)
        return make(batch, most)

    def _prefill(self, rows: list["_Row"], caches: Caches) -> Tensor:
        """Logits `[B, V]` after each prompt, of which the caches may hold the start already."""
        held = int(caches.lengths[0])
        prompts = [row.prompt[held:] for row in rows]
        lengths = torch.tensor([len(p) for p in prompts], device=self.model.device)
        width = max(map(len, prompts))
        ids = torch.tensor([p + p[:1] * (width - len(p)) for p in prompts], device=lengths.device)
        keep = None
        if any(len(p) < width for p in prompts):
            keep = torch.arange(width, device=lengths.device) < lengths[:, None]
        shown = [row.pixels.to(lengths.device) for row in rows if row.pixels is not None]
        extra = {"pixel_values": torch.cat(shown)} if shown else {}
        hidden = self.model.backbone(ids, attention_mask=keep, caches=caches, **extra)
        last = hidden[torch.arange(len(rows), device=lengths.device), lengths - 1]
        return cast(nn.Module, self.model.head)(last)

    def _logits(self, ids: Tensor, caches: Caches) -> Tensor:
        """Logits `[B, V]` after one more token a row `[B, 1]`."""
        return cast(nn.Module, self.model.head)(self.model.backbone(ids, caches=caches)[:, -1])


class _Row:
    """One prompt and the text so far."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        config: GenerationConfig,
        seed: int,
        room: int | None,
        pixels: Tensor | None = None,
    ) -> None:
        self.pixels = pixels
        self.prompt, self.config, self.seed = prompt, config, seed
        self.limit = config.max_new_tokens if room is None else min(config.max_new_tokens, room)
        self.ends = _end_ids(tokenizer, config)
        self.writer = TextWriter(
            tokenizer, config.stop, config.min_new_tokens, config.skip_special_tokens
        )
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] | None = None if config.logprobs is None else []
        self.is_complete = False
        self.finish_reason = "length" if self.limit <= 0 else ""

    @property
    def done(self) -> bool:
        return bool(self.finish_reason)

    def take(self, token_id: int, logprob: TokenLogprob | None) -> str:
        """Add a token, unless the row is done; returns the text it made certain."""
        if self.finish_reason:
            return ""
        if token_id < 0:
            raise DataError(
                f"the model's logits are not finite after {len(self.prompt) + len(self.ids)} "
                "tokens; load it with dtype=torch.float32, or check its weights"
            )
        self.ids.append(token_id)
        if self.logprobs is not None and logprob is not None:
            self.logprobs.append(logprob._replace(top=logprob.top[: self.config.logprobs]))
        piece = ""
        if token_id in self.ends:
            self.finish_reason = "stop"
        else:
            piece = self.writer.push(token_id)
            if self.writer.stopped or self.is_complete:
                self.finish_reason = "stop"
            elif len(self.ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            piece += self.writer.flush()
            if self.writer.stopped:
                self.finish_reason = "stop"
        if piece:
            self.pieces.append(piece)
        return piece

    def result(self) -> Generation:
        return Generation(
            "".join(self.pieces), self.ids, self.logprobs, self.finish_reason, len(self.prompt)
        )


def _end_ids(tokenizer: Tokenizer, config: GenerationConfig) -> frozenset[int]:
    ends: set[int] = set()
    if not config.ignore_eos:
        ends.update(tokenizer.eos_ids, config.stop_token_ids)
    # A stop string that is a special token would not show in a text that leaves those out.
    for stop in config.stop:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in tokenizer.special_ids:
            ends.update(ids)
    return frozenset(ends)


def _tell(sampler: Sampler, slot: int, row: _Row, token: int) -> None:
    """Let the sampler know what was drawn. Errors: DataError where it could not draw."""
    if token < 0 and (problem := sampler.problem(slot)):
        raise DataError(problem)
    sampler.write(slot, len(row.ids), [token])
    sampler.accept(slot, [token])
    # Without a token that ends a text, only the grammar knows that it is over.
    row.is_complete = not row.ends and sampler.is_complete(slot)


def _start_over(caches: Caches, rows: list[int]) -> None:
    """Let rows that are done run on from position 0, where they can never outgrow the caches.

    That keeps every step free of masks; what they compute is not looked at.
    """
    caches.lengths[rows] = 0
    caches.sync()


def _is_one(prompts: object) -> bool:
    """Whether this is one prompt: a string, or a list of ids."""
    if isinstance(prompts, str):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int)
