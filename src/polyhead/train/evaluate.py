"""How well a causal model predicts text: loss, perplexity, bits per byte."""

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from polyhead.errors import DataError
from polyhead.train.corpus import Source, Tokens, check_ids, documents
from polyhead.train.data import window_batch
from polyhead.train.objectives import IGNORE, LanguageBatch, Objective, causal_lm


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
    predicted, and neither it nor its bytes count.
    """
    stride = max(1, context // 2) if stride is None else stride
    vocab_size = model.config.vocab_size
    nll, tokens, text_bytes = 0.0, 0, 0
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode(), _evaluating(model):
        for text in documents(source):
            ids, unscored = _prepare(text, tokenizer, vocab_size)
            text_bytes += len(text.encode()) - unscored
            for row in _windows(ids, context, stride):
                rows.append(row)
                if len(rows) == batch_size:
                    nll, tokens = _add(model, rows, nll, tokens)
                    rows = []
        if rows:
            nll, tokens = _add(model, rows, nll, tokens)
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
    with torch.inference_mode(), _evaluating(model):
        for at in range(0, take, batch_size):
            batch = window_batch(tokens.ids, starts[at : at + batch_size], context)
            loss = objective(model, batch.to(device))
            nll += float(loss.parts.get("loss", loss.total))
            scored += loss.tokens
    return Score(nll, scored, scored * tokens.bytes_per_token)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode inside the block, as it was after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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


def _windows(ids: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels of sliding windows; a label is scored in the first window that has it."""
    scored, last = 0, len(ids) - 1
    for start in range(0, max(0, last), stride):
        end = min(start + context, last)
        labels = ids[start + 1 : end + 1].copy()
        labels[: scored - start] = IGNORE
        yield ids[start:end], labels
        scored = end
        if end == last:
            return


def _add(
    model: Any, rows: list[tuple[np.ndarray, np.ndarray]], nll: float, tokens: int
) -> tuple[float, int]:
    """Score a batch of windows, padded on the right, where no causal row can see it."""
    longest = max(len(ids) for ids, _ in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORE)
    for row, (ids, wanted) in enumerate(rows):
        inputs[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(wanted)] = torch.from_numpy(wanted)
    device = next(model.parameters()).device
    loss = causal_lm(model, LanguageBatch(inputs, labels).to(device))
    return nll + float(loss.total), tokens + loss.tokens
