"""Answers of encoder-decoders: greedy, drawn, or by beams; every source is encoded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import BLOCK_SIZE, EngineConfig
from polyhead.generate.intake import copies_of, rows_of
from polyhead.generate.request import Request
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.search import Hypothesis
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 4096
"""Of sources with their padding, times the texts written to each: what one batch holds."""


class Seq2Seq:
    """Writes answers to sources; of a call, only its engine is kept, for another of its size.

    A row gives what it gives alone, whatever else is in its batch.
    Errors: ConfigError for a model that is no encoder-decoder with a language head.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer | None = None) -> None:
        kind = getattr(model.config, "kind", "decoder")
        if kind != "encoder-decoder" or model.head_kind != "lm":
            raise ConfigError(
                f"{model.config.model_type} with head {model.head_kind!r} is no encoder-decoder "
                "that writes; use a t5, marian or transformer with head='lm'"
            )
        self.model, self.tokenizer = model, tokenizer
        self._idle: Engine | None = None
        self.start, self.ends = start_id(model, tokenizer), end_ids(model, tokenizer)

    def settings(self, **changes: Any) -> GenerationConfig:
        """What the checkpoint recommends, with changes."""
        return GenerationConfig.from_hf(recommended(self.model), encoder_decoder=True, **changes)

    def generate(
        self,
        sources: Sequence[Sequence[int]],
        config: GenerationConfig | None = None,
        *,
        tokens_at_once: int = TOKENS_AT_ONCE,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """The answers to each source's ids, as many as `num_return_sequences`; of beams, the best
        first, and where it is 1 up to `num_beams`.

        config: None is what the checkpoint recommends. tokens_at_once: source tokens of a batch,
        times the texts that are written to each. progress: called with the sources that are done,
        and with all. Errors: DataError for a source without tokens, or with ids out of range.
        """
        config = self.settings() if config is None else config
        rows = [list(source) for source in sources]
        for number, row in enumerate(rows):
            if not row:
                raise DataError(f"source {number} has no tokens; give it some text")
        start = config.decoder_start_token_id
        start = self.start if start is None else start
        if start is None:
            raise ConfigError(
                "nothing says what the decoder begins with; give decoder_start_token_id"
            )
        if config.num_beams > 1 and config.num_return_sequences == 1:
            config = replace(config, num_return_sequences=config.num_beams)
        ends = frozenset(() if config.ignore_eos else {*self.ends, *config.stop_token_ids})
        if not rows:
            return []
        engine = self._take_engine(_size(rows, config, tokens_at_once))
        copies = copies_of(config)
        each = [row for row in rows for _ in range(copies)]
        seeds = row_seeds([config] * len(each), each, True)
        # What is of like length runs together.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        requests = {
            i: engine.add(
                [start], config, source=rows[i], ends=ends,
                seeds=seeds[i * copies : (i + 1) * copies],
            )
            for i in order
        }  # fmt: skip
        while engine.has_work:
            done = engine.step()
            if progress is not None and done:
                progress(sum(request.is_finished for request in requests.values()), len(rows))
        self._idle = engine
        return [_hypotheses(requests[i]) for i in range(len(rows))]

    def _take_engine(self, size: EngineConfig) -> Engine:
        """The engine of the last call, where it was of this size: its steps are recorded already.
        Whoever has it has it alone, and where a call fails nobody gets it back."""
        engine, self._idle = self._idle, None
        if engine is None or engine.config != size or not engine.is_of(self.model):
            engine = Engine(self.model, self.tokenizer, size)
        return engine


def _size(
    rows: Sequence[Sequence[int]], config: GenerationConfig, tokens_at_once: int
) -> EngineConfig:
    """Room for as many sources at once as `tokens_at_once` says."""
    longest, texts = max(map(len, rows)), rows_of(config)
    at_once = max(1, min(len(rows), tokens_at_once // (longest * texts)))
    blocks = -(-longest // BLOCK_SIZE) * at_once, -(-(1 + config.max_new_tokens) // BLOCK_SIZE) + 1
    return EngineConfig(
        max_rows=at_once * texts, source_tokens=blocks[0] * BLOCK_SIZE,
        cache_tokens=at_once * texts * blocks[1] * BLOCK_SIZE,
    )  # fmt: skip


def _hypotheses(request: Request) -> list[Hypothesis]:
    return [Hypothesis(answer.token_ids, answer.score or 0.0) for answer in request.outcome()]


def recommended(model: TaskModel) -> Mapping[str, Any]:
    """The checkpoint's `generation_config.json`, or what old files say of it in `config.json`."""
    return model.generation or model.hf_config()


def start_id(model: TaskModel, tokenizer: Tokenizer | None = None) -> int | None:
    """What the decoder reads first: as the checkpoint says, or the tokenizer's bos or pad."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in (model.generation, model.hf_config()):
            if source.get(name) is not None:
                return int(source[name])
    if tokenizer is None:
        return None
    return tokenizer.pad_id if tokenizer.bos_id is None else tokenizer.bos_id


def end_ids(model: TaskModel, tokenizer: Tokenizer | None = None) -> frozenset[int]:
    """The tokens that end an answer."""
    for source in (model.generation, model.hf_config()):
        if (said := source.get("eos_token_id")) is not None:
            return frozenset(said if isinstance(said, list) else [said])
    return frozenset() if tokenizer is None else frozenset(tokenizer.eos_ids)
