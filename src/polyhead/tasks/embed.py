"""One vector for each text, pooled as the checkpoint says, or the mean over its tokens."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.mode import evaluating
from polyhead.generate.prompts import check_ids, encode_prompt
from polyhead.models.model import TaskModel
from polyhead.models.sentence import Sentences
from polyhead.nn.pooling import Pooling
from polyhead.tasks.fit import kind_of
from polyhead.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

_TOKENS_A_ROW = 64


def embed(
    model: TaskModel,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    batch_size: int = 32,
    normalize_embeddings: bool | None = None,
    convert_to_tensor: bool = True,
    prompt_name: str | None = None,
    truncate_dim: int | None = None,
) -> "Tensor | np.ndarray":
    """Embeddings float32 `[N, P]` in the order of `texts`; `[P]` for a single string.

    A sentence-transformers directory gives its own pooling, length, prompts and normalisation;
    any other model the mean over a text's tokens, of length 1. A text's vector is its own,
    whatever shares its batch; one longer than the model is cut off at the end.

    batch_size: texts at once at 64 tokens each; more of shorter ones, fewer of longer ones.
    normalize_embeddings: to length 1; None: as the checkpoint says. prompt_name: of the
    checkpoint's prompts, put before every text. truncate_dim: that many first numbers (Matryoshka).
    convert_to_tensor: False gives a numpy array.
    Errors: DataError for an empty text where the tokenizer has no token to stand for it,
    ConfigError for a prompt that the checkpoint does not have, and for a model of another kind.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    if kind_of(model) not in ("encoder", "decoder"):
        raise ConfigError(
            f"{model.config.model_type} is of the kind {kind_of(model)}; vectors of texts need an "
            "encoder or a decoder, such as bert"
        )
    wanted = [texts] if isinstance(texts, str) else texts
    how = model.sentences or Sentences()
    pooling = model.head if isinstance(model.head, Pooling) else how.pooling
    pooling.to(model.device, model.dtype)
    rows = _encode(model, tokenizer, _prompted(wanted, how, prompt_name), how)
    # Written after each batch: nothing of a batch outlives it but its vectors.
    found: Tensor | None = None
    with evaluating(model), torch.inference_mode():
        for batch in _batches(rows, batch_size * _TOKENS_A_ROW):
            vectors = _vectors(model, pooling, [rows[i] for i in batch])
            if found is None:
                found = torch.empty(len(rows), vectors.shape[1])
            found[batch] = vectors.cpu()
    if found is None:
        found = torch.empty(0, getattr(model.config, "d_model"))  # noqa: B009
    found = found[:, :truncate_dim]
    is_normal = pooling.normalize if normalize_embeddings is None else normalize_embeddings
    if is_normal:
        found = F.normalize(found, dim=-1)
    answer = found[0] if isinstance(texts, str) else found
    return answer.to(model.device) if convert_to_tensor else answer.numpy()


def _prompted(texts: Sequence[str], how: Sentences, name: str | None) -> Sequence[str]:
    name = how.prompt if name is None else name
    if name is not None and name not in how.prompts:
        there = ", ".join(how.prompts) or "none"
        raise ConfigError(f"the checkpoint has no prompt {name!r}; it has {there}")
    prompt = "" if name is None else how.prompts[name]
    if not (prompt or how.lowercase):
        return texts
    return [(prompt + text).lower() if how.lowercase else prompt + text for text in texts]


def _encode(
    model: TaskModel, tokenizer: Tokenizer, texts: Sequence[str], how: Sentences
) -> list[list[int]]:
    """Ids of each text, framed as the tokenizer frames them, no longer than the model takes."""
    vocab_size = getattr(model.config, "vocab_size")  # noqa: B009
    limits = [limit for limit in (how.max_tokens, model.config.max_tokens) if limit is not None]
    if kind_of(model) == "decoder":
        rows = [encode_prompt(text, tokenizer, vocab_size) for text in texts]
        return [row[: min(limits, default=None)] for row in rows]
    rows = tokenizer.encode_batch(texts)
    frame = tokenizer.encode("") if limits else []
    for number, row in enumerate(rows):
        check_ids((max(row, default=0),), vocab_size)
        if limits and len(row) > min(limits):
            rows[number] = _cut(row, min(limits), frame)
    return rows


def _cut(row: list[int], length: int, frame: list[int]) -> list[int]:
    """The first tokens, and the special ones that the tokenizer puts at the end."""
    last = len(frame) - 1 if len(frame) > 1 else 0
    ending = frame[1:] if last and row[-last:] == frame[1:] else []
    return row[: length - len(ending)] + ending


def _batches(rows: Sequence[Sequence[int]], most_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length, `most_tokens` with padding, or a single row."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > most_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _vectors(model: TaskModel, pooling: Pooling, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[b, P]` of ragged rows of ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).to(model.device)
    return pooling.vectors(model.backbone(ids.to(model.device), attention_mask=mask), mask)
