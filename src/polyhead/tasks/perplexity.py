"""How well a causal language model predicts a text, and an encoder-decoder its targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from polyhead.errors import ConfigError, DataError
from polyhead.generate.prompts import check_ids
from polyhead.generate.score import summed_nats
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel, require_causal
from polyhead.nn.mode import evaluating
from polyhead.text.tokenizer import Tokenizer

_MOST_CONTEXT = 2048
_UNSCORED = -100
_MOST_TARGET = 512


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The mean surprise over a text; `float()` of it is the perplexity.

    loss: nats a token. bits_per_byte compares models of different tokenizers. tokens, bytes: what
    was scored.
    """

    perplexity: float
    bits_per_byte: float
    loss: float
    tokens: int
    bytes: int

    @property
    def bits_per_token(self) -> float:
        """The loss to base 2."""
        return self.loss / math.log(2)

    def __float__(self) -> float:
        return self.perplexity


def perplexity(
    model: TaskModel,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Score every token of `text` once, in windows of `context` tokens that start `stride` apart.

    A token has at least `context - stride` tokens before it, except at the start of the text. The
    first token is scored if the tokenizer begins texts with a bos token; otherwise nothing comes
    before it, and neither it nor its bytes count.

    context: None is the model's `max_seq_len`, at most 2048. stride: None is half of it.
    batch_size: windows at once. Memory does not grow with the text beyond its ids.
    Errors: DataError for a text without a token to score, ConfigError for an impossible window.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    require_causal(model)
    context, stride = window_of(model, context, stride)
    ids, num_bytes = scorable(tokenizer, text)
    check_ids(ids, getattr(model.config, "vocab_size"))  # noqa: B009
    # A window of `context` tokens reads all but its last, which it predicts.
    total, tokens = summed_nats(model, [torch.tensor(ids)], context - 1, stride, batch_size)
    loss = total / tokens
    return Perplexity(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / num_bytes,
        loss=loss,
        tokens=tokens,
        bytes=num_bytes,
    )


def window_of(model: TaskModel, context: int | None, stride: int | None) -> tuple[int, int]:
    """The window asked for, or the model's own; ConfigError for one that cannot be."""
    most: int = getattr(model.config, "max_seq_len", None) or _MOST_CONTEXT
    if context is None:
        context = min(most, _MOST_CONTEXT)
    if stride is None:
        stride = max(context // 2, 1)
    if not 2 <= context <= most:
        raise ConfigError(f"context={context} must be from 2 to the model's {most} tokens")
    if not 1 <= stride < context:
        raise ConfigError(f"stride={stride} must be from 1 to context - 1 = {context - 1}")
    return context, stride


def scorable(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """Ids of which all but the first are scored, and how many bytes of text those are."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    num_bytes = len(text.encode())
    if ids and tokenizer.bos_id is not None and tokenizer.encode(text)[0] == tokenizer.bos_id:
        if ids[0] != tokenizer.bos_id:
            ids = [tokenizer.bos_id, *ids]
    elif ids:
        num_bytes -= len(tokenizer.decode(ids[:1], skip_special_tokens=False).encode())
    if len(ids) < 2 or num_bytes <= 0:
        raise DataError(
            f"a text of {len(text)} characters has no token to score; give a longer one"
        )
    return ids, num_bytes


def target_perplexity(
    model: TaskModel, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], batch_size: int = 8
) -> float:
    """Of an encoder-decoder: each target's tokens and its end, scored by its source and what comes
    before them in it. What is longer than the model, or than 512 tokens, loses its end.

    pairs: sources and targets. Errors: DataError without any, ConfigError for a model that is no
    encoder-decoder with a language head, or a tokenizer that does not say how targets begin or end.
    """
    if not pairs:
        raise DataError("there are no sources and targets to score; give some")
    start, end = Seq2Seq(model, tokenizer).start, tokenizer.eos_id
    if start is None or end is None:
        what = "ends" if end is None else "starts"
        raise ConfigError(f"the tokenizer has no token that {what} a target: give it bos and eos")
    most = min(model.config.max_tokens or _MOST_TARGET, _MOST_TARGET)
    nats, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for at in range(0, len(pairs), batch_size):
            some = pairs[at : at + batch_size]
            read = tokenizer([source for source, _ in some], max_len=most, truncate=True)
            targets = tokenizer.encode_targets([target for _, target in some])
            targets = [[*ids[: most - 1], end] for ids in targets]
            wanted = torch.full((len(some), max(map(len, targets))), _UNSCORED)
            for row, ids in zip(wanted, targets, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            given = wanted.roll(1, 1).clamp_min(0)
            given[:, 0] = start
            wanted = wanted.to(model.device)
            logits = model(
                read.input_ids.to(model.device),
                given.to(model.device),
                attention_mask=read.attention_mask.to(model.device),
            )
            losses = F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="sum")
            nats, tokens = nats + float(losses), tokens + int((wanted != _UNSCORED).sum())
    return math.exp(nats / tokens) if nats / tokens < 700 else math.inf
