"""How well a causal model predicts text: loss, perplexity, bits per byte."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyhead.errors import ConfigError, DataError
from polyhead.generate.score import summed_nats
from polyhead.nn.mode import evaluating
from polyhead.train.blend import texts_of
from polyhead.train.data import Dataset, once, window_batch
from polyhead.train.objectives import Objective, causal_lm
from polyhead.train.registry import Metric
from polyhead.train.sources import Source
from polyhead.train.tokens import Tokens, check_ids


@dataclass(frozen=True)
class Score:
    """Sum of -log p (nats) over `tokens` tokens that stand for `text_bytes` bytes of text."""

    nll: float
    tokens: int
    text_bytes: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nll / math.log(2) / self.text_bytes

    def to_dict(self) -> dict[str, float]:
        """loss, perplexity, bits_per_byte, tokens, bytes."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(self.loss) if self.loss < 700 else math.inf,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": round(self.text_bytes),
        }


def score_texts(
    model: Any,
    tokenizer: Any,
    source: Source,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> Score:
    """Score every token of every document once, each with at least `context - stride` before it.

    Windows of `context` tokens advance by `stride` (half of them unless given). A document begins
    after the tokenizer's bos, or else eos, token; without either its first token cannot be
    predicted, and neither it nor its bytes count. ConfigError unless 1 <= stride <= context <= what
    the model takes.
    """
    stride = max(1, context // 2) if stride is None else stride
    _check_window(context, stride, getattr(model.config, "max_seq_len", None))
    text_bytes = 0

    def rows() -> Iterator[torch.Tensor]:
        nonlocal text_bytes
        for text in texts_of(source):
            ids, unscored = _prepare(text, tokenizer, model.config.vocab_size)
            text_bytes += len(text.encode()) - unscored
            yield torch.from_numpy(ids)

    nll, tokens = summed_nats(model, rows(), context, stride, batch_size)
    if tokens == 0:
        raise DataError("there is no token to score: give longer texts")
    return Score(nll, tokens, text_bytes)


def score_tokens(
    model: Any,
    tokens: Tokens,
    *,
    context: int,
    batch_size: int,
    batches: int = 0,
    objective: Objective = causal_lm,
) -> Score:
    """Quick score of held-out tokens: windows side by side, `batches` of them or (0) all."""
    last = len(tokens.ids) - 1
    context = min(context, last)
    count = last // context
    take = count if batches == 0 else min(count, batches * batch_size)
    starts = np.arange(take) * count // take * context
    nll, scored = 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode(), evaluating(model):
        for at in range(0, take, batch_size):
            batch = window_batch(tokens.ids, starts[at : at + batch_size], context)
            loss = objective(model, batch.to(device))
            nll += float(loss.parts.get("loss", loss.total))
            scored += loss.tokens
    return Score(nll, scored, scored * tokens.bytes_per_token)


def score_dataset(
    model: Any,
    dataset: Dataset,
    objective: Objective,
    metric: Metric | None,
    batch_size: int,
    batches: int = 0,
) -> dict[str, float]:
    """`loss`, a mean over what counts, and the metric's figures, of `batches` batches or (0) all
    rows, each once."""
    total, counted = 0.0, 0
    answers: list[tuple[torch.Tensor, ...]] = []
    device = next(model.parameters()).device
    with torch.inference_mode(), evaluating(model):
        for batch in once(dataset, batch_size, batches):
            loss = objective(model, batch.to(device))
            total += float(loss.parts.get("loss", loss.total))
            counted += loss.tokens
            answers.append(tuple(answer.cpu() for answer in loss.answers))
        if counted == 0:
            raise DataError("nothing that is held out counts: every label is masked")
        figures = {} if metric is None else metric(model, dataset, answers)
    return {"loss": total / counted, **figures}


def _check_window(context: int, stride: int, limit: int | None) -> None:
    if context < 1:
        raise ConfigError(f"context is {context}: set it to 1 or more")
    if limit is not None and context > limit:
        raise ConfigError(
            f"context is {context}, and the model takes {limit}: set it to that or less"
        )
    if not 1 <= stride <= context:
        raise ConfigError(f"stride is {stride}: set it between 1 and the context, {context}")


def _prepare(text: str, tokenizer: Any, vocab_size: int) -> tuple[np.ndarray, int]:
    """Ids with what they begin after, and the bytes that go unscored."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    unscored = 0
    if begin is not None:
        ids = [begin, *ids]
    elif ids:
        unscored = len(tokenizer.decode(ids[:1]).encode())
    array = np.asarray(ids, dtype=np.int64)
    check_ids(array, vocab_size)
    return array, unscored
