"""What is asked, looked over: a prompt's ids, how long its texts may be, and what ends them."""

import itertools
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b

from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.memory import Memory
from polyhead.generate.prompts import Prompt, check_ids, encode_prompt
from polyhead.generate.request import Request, Text
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.searching import search_of
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer


class Intake:
    """Makes requests for one model and the memory that it has; any thread may ask for one."""

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer | None,
        memory: Memory,
        sampler: Sampler,
        config: EngineConfig,
    ) -> None:
        self.model, self.tokenizer, self.memory, self.config = model, tokenizer, memory, config
        self.sampler = sampler
        self.vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
        self.longest: int | None = getattr(model.config, "max_seq_len", None)
        self._numbers = itertools.count()

    def request(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        priority: int = 0,
        client: str = "",
        source: Sequence[int] = (),
        pixels: Tensor | None = None,
        ends: Collection[int] | None = None,
        seeds: Sequence[int] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Request:
        """A request that waits for nothing yet.

        prompt: a text or ids, in which an image is as many tokens as it has features. Of requests
        that wait, a higher `priority` goes first; within one, each `client` gets an equal share.
        source: what an encoder reads. pixels:
        `[N, C, height, width]` of the N images in the prompt. ends: the tokens that end a text;
        None: the tokenizer's and the config's. seeds: one a copy; None: those that follow from the
        config and the prompt. on_text: gets each piece of the first text as it becomes certain.
        Errors: DataError for a prompt that does not fit the model or the cache, ConfigError for
        more texts at once than rows.
        """
        config = config or GenerationConfig()
        ids = encode_prompt(prompt, self.tokenizer, self.vocab_size)
        ends = end_ids(self.tokenizer, config) if ends is None else frozenset(ends)
        self._check_source(source)
        if config.is_guided and (source or pixels is not None):
            raise ConfigError(
                f"guidance_scale={config.guidance_scale} is for a prompt alone, and here are "
                f"{'images' if pixels is not None else 'ids of a source'}; leave it at 1"
            )
        away = negative_ids(config, ids, self.tokenizer, self.vocab_size)
        rows, copies = rows_of(config), copies_of(config)
        if rows > self.config.max_rows:
            raise ConfigError(
                f"{rows} texts at once are more than max_rows={self.config.max_rows}; give the "
                "engine more max_rows, or ask for fewer"
            )
        limit, search = self._limit(ids, away, config, rows), search_of(config)
        request = Request(
            prompt=ids, config=config, number=next(self._numbers), limit=limit, ends=ends,
            seeds=list(seeds or row_seeds([config] * copies, [ids] * copies, True)),
            priority=priority, client=client, source=list(source), pixels=pixels,
            images=[] if pixels is None else self._images(ids, len(pixels)),
            compiled=self.sampler.prepare(config), salt=_salt(pixels), on_text=on_text,
            search=search and search(ends, limit),
        )  # fmt: skip
        text = Text(request, 0, self.tokenizer)
        request.texts = [text, text.accompanied(away)] if away else [text]
        return request

    def _images(self, ids: Sequence[int], count: int) -> list[tuple[int, int]]:
        image_id = getattr(self.model.config, "image_token_id")  # noqa: B009
        at = [place for place, i in enumerate(ids) if i == image_id]
        size = len(at) // count
        if not size or size * count != len(at):
            raise DataError(f"the prompt has {len(at)} image tokens for {count} images")
        return [(at[n * size], at[(n + 1) * size - 1] + 1) for n in range(count)]

    def _check_source(self, source: Sequence[int]) -> None:
        sources = self.memory.sources
        if sources is None or not source:
            if bool(source) != (sources is not None):
                kind = self.model.config.model_type
                raise ConfigError(
                    f"{kind} reads no source; leave it out"
                    if source
                    else f"{kind} reads a source first; give its ids"
                )
            return
        check_ids(source, self.vocab_size)
        room = (sources.place.num_blocks - 1) * self.memory.block_size
        if len(source) > room:
            raise DataError(
                f"the source has {len(source)} tokens and the cache holds {room}; shorten it, or "
                "give the engine more source_tokens"
            )

    def _limit(
        self, prompt: Sequence[int], away: Sequence[int], config: GenerationConfig, rows: int
    ) -> int:
        """Tokens that may be written, so that the request fits the cache when it is alone."""
        length, longest = max(len(prompt), len(away)), self.longest
        name = "prompt" if length == len(prompt) else "negative prompt"
        if longest is not None and length > longest:
            raise DataError(
                f"the {name} has {length} tokens and the model takes {longest}; shorten it"
            )
        # Texts of two prompts share neither.
        room = self.memory.longest(0 if away else length, rows)
        if length > room:
            raise DataError(
                f"the {name} has {length} tokens and the cache holds {room}; shorten it, or give "
                "the engine more cache_tokens"
            )
        return min(config.max_new_tokens, min(room, longest or room) - length)


def negative_ids(
    config: GenerationConfig, prompt: list[int], tokenizer: Tokenizer | None, vocab_size: int
) -> list[int]:
    """What guidance leads a prompt's texts away from; nothing, where there is none."""
    if not config.is_guided:
        return []
    given = config.negative_prompt or config.negative_prompt_ids
    return encode_prompt(given, tokenizer, vocab_size) if given else prompt[-1:]


def prompt_ids(
    model: TaskModel, tokenizer: Tokenizer | None, prompt: Prompt, with_images: bool = False
) -> list[int]:
    """The ids of a prompt, where it comes with images each image token as often as one has
    features. Errors: ConfigError for images to a model that reads none; as `encode_prompt`."""
    vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
    ids = encode_prompt(prompt, tokenizer, vocab_size)
    if not with_images:
        return ids
    if not isinstance(model.config, LlavaConfig):
        raise ConfigError(f"{model.config.model_type} reads no images; leave them out")
    return model.config.with_room(ids)


def copies_of(config: GenerationConfig) -> int:
    """Texts that are drawn from one prompt."""
    return 1 if search_of(config) else max(config.best_of or 1, config.num_return_sequences)


def rows_of(config: GenerationConfig) -> int:
    """Rows that a request takes at most."""
    if config.penalty_alpha:
        return config.top_k
    return max(config.num_beams, copies_of(config)) * (2 if config.is_guided else 1)


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


def _salt(pixels: Tensor | None) -> bytes:
    """What stands for the images where a text is looked for."""
    if pixels is None:
        return b""
    return blake2b(pixels.detach().cpu().float().contiguous().numpy().tobytes()).digest()
