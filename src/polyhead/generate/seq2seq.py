"""Answers of encoder-decoders: greedy, drawn, or by beams; every source is encoded once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.constraints import Constraints
from polyhead.generate.mode import evaluating
from polyhead.generate.prompts import check_ids
from polyhead.generate.sampling import Sampler, row_seeds
from polyhead.generate.search import Hypothesis, beam_search
from polyhead.generate.search_config import SearchConfig
from polyhead.generate.steps import TranslationSteps
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

TOKENS_AT_ONCE = 4096
"""Of sources with their padding, times beams: what one batch holds."""


class Seq2Seq:
    """Writes answers to sources; keeps nothing between calls.

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
        self.model = model
        self.start, self.ends = start_id(model, tokenizer), end_ids(model, tokenizer)

    def settings(self, **changes: Any) -> SearchConfig:
        """What the checkpoint recommends, with changes."""
        return SearchConfig.from_hf(recommended(self.model), **changes)

    def generate(
        self,
        sources: Sequence[Sequence[int]],
        config: SearchConfig | None = None,
        *,
        tokens_at_once: int = TOKENS_AT_ONCE,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Hypothesis]]:
        """The answers to each source's ids: up to `num_beams` of them, the best first.

        config: None is what the checkpoint recommends. tokens_at_once: source tokens of a batch,
        times beams. progress: called with the sources that are done, and with all. Errors:
        DataError for a source without tokens, or with ids out of range.
        """
        config = self.settings() if config is None else config
        rows = [list(source) for source in sources]
        for number, row in enumerate(rows):
            if not row:
                raise DataError(f"source {number} has no tokens; give it some text")
            check_ids(row, getattr(self.model.config, "vocab_size"))  # noqa: B009
        seeds = row_seeds([config] * len(rows), rows, True)
        found: list[list[Hypothesis]] = [[] for _ in rows]
        with evaluating(self.model), torch.inference_mode():
            for batch in batches(list(map(len, rows)), tokens_at_once // config.num_beams):
                chosen = [rows[i] for i in batch]
                answers = self._answers(chosen, config, [seeds[i] for i in batch])
                for i, answer in zip(batch, answers, strict=True):
                    found[i] = answer
                if progress is not None:
                    progress(sum(map(bool, found)), len(rows))
        return found

    def _answers(
        self, sources: list[list[int]], config: SearchConfig, seeds: list[int]
    ) -> list[list[Hypothesis]]:
        start = config.decoder_start_token_id
        start = self.start if start is None else start
        if start is None:
            raise ConfigError(
                "nothing says what the decoder begins with; give decoder_start_token_id"
            )
        ends = frozenset(() if config.ignore_eos else {*self.ends, *config.stop_token_ids})
        steps = TranslationSteps(self.model, sources, start)
        prompts = [[start]] * len(sources)
        if config.num_beams > 1:
            return beam_search(steps, steps.first, prompts, config, ends)
        return _one_by_one(steps, prompts, config, ends, seeds)


def _one_by_one(
    steps: TranslationSteps,
    prompts: list[list[int]],
    config: SearchConfig,
    ends: frozenset[int],
    seeds: list[int],
) -> list[list[Hypothesis]]:
    """One answer a source, a token at a time, greedy or drawn."""
    count, most = len(prompts), config.max_new_tokens
    constraints = Constraints(config, ends)
    # The constraints have penalized and banned already.
    plain = SearchConfig(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
    )
    device = steps.first.device
    sampler = Sampler([plain] * count, prompts, seeds, [()] * count, most, device)
    answers: list[list[int]] = [[] for _ in prompts]
    written: list[list[int]] = answers.copy()
    done = [False] * count
    logits = steps.first
    while True:
        drawn: Tensor = sampler(constraints(logits.float(), prompts, written))
        written = [[*text, token] for text, token in zip(written, drawn.tolist(), strict=True)]
        for row, text in enumerate(written):
            if not done[row]:
                if text[-1] < 0:
                    raise DataError(
                        "the model's logits are not finite; load it with dtype=torch.float32"
                    )
                answers[row] = text
                done[row] = text[-1] in ends or len(text) == most
        if all(done):
            return [[Hypothesis(tuple(answer))] for answer in answers]
        logits = steps.read(drawn.clamp(min=0)[:, None])


def batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, `most_tokens` with their padding, or a single row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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
