"""One vector for each text, pooled as the checkpoint says, or the mean over its tokens."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.prompts import check_ids, encode_prompt
from polyhead.models.model import TaskModel
from polyhead.models.sentence import Sentences
from polyhead.nn.mode import evaluating
from polyhead.nn.pooling import Pooling
from polyhead.tasks.fit import kind_of
from polyhead.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

_TOKENS_A_ROW = 24  # so few that what they become stays in a CPU's caches


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

    batch_size: texts at once at 24 tokens each; more of shorter ones, fewer of longer ones.
    normalize_embeddings: to length 1; None: as the checkpoint says. prompt_name: of the
    checkpoint's prompts, put before every text. truncate_dim: that many first numbers (Matryoshka).
    convert_to_tensor: False gives a numpy array. Which texts are cut, `cut_texts` tells.
    Errors: DataError for an empty text where the tokenizer has no token to stand for it,
    ConfigError for a prompt that the checkpoint does not have, and for a model of another kind.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    _check_kind(model)
    wanted = [texts] if isinstance(texts, str) else texts
    pooling = _pooling(model)
    rows = _cut(_encode(model, tokenizer, wanted, prompt_name), limit(model), tokenizer)
    found = _embedded(model, pooling, rows, batch_size * _TOKENS_A_ROW)[:, :truncate_dim]
    if pooling.normalize if normalize_embeddings is None else normalize_embeddings:
        found = F.normalize(found, dim=-1)
    answer = found[0] if isinstance(texts, str) else found
    return answer.to(model.device) if convert_to_tensor else answer.numpy()


def cut_texts(
    model: TaskModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    prompt_name: str | None = None,
) -> list[int]:
    """The numbers of the texts whose end `embed` does not read: those longer than `limit`."""
    most = limit(model)
    if most is None:
        return []
    rows = _encode(model, tokenizer, texts, prompt_name)
    return [number for number, row in enumerate(rows) if len(row) > most]


def limit(model: TaskModel) -> int | None:
    """Tokens of a text that `embed` reads, prompt and special ones included; None: all."""
    said = None if model.sentences is None else model.sentences.max_tokens
    return min((most for most in (said, model.config.max_tokens) if most is not None), default=None)


def _check_kind(model: TaskModel) -> None:
    kind = kind_of(model)
    if kind not in ("encoder", "decoder"):
        raise ConfigError(
            f"{model.config.model_type} is of the kind {kind}; vectors of texts need an encoder "
            "or a decoder, such as bert"
        )


def _pooling(model: TaskModel) -> Pooling:
    """The model's head, or what its directory says, in its type and where it is."""
    said = model.sentences or Sentences()
    pooling = model.head if isinstance(model.head, Pooling) else said.pooling
    return pooling.to(model.device, model.dtype)


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
    model: TaskModel, tokenizer: Tokenizer, texts: Sequence[str], prompt_name: str | None
) -> list[list[int]]:
    """Ids of each text after its prompt, framed as the tokenizer frames them."""
    texts = _prompted(texts, model.sentences or Sentences(), prompt_name)
    vocab_size = getattr(model.config, "vocab_size")  # noqa: B009
    if kind_of(model) == "decoder":
        return [encode_prompt(text, tokenizer, vocab_size) for text in texts]
    rows = tokenizer.encode_batch(texts)
    for row in rows:
        check_ids((max(row, default=0),), vocab_size)
    return rows


def _cut(
    rows: Sequence[list[int]], length: int | None, tokenizer: Tokenizer
) -> Sequence[list[int]]:
    """Of each row the first tokens, and the special ones that the tokenizer puts at the end."""
    if length is None or all(len(row) <= length for row in rows):
        return rows
    ending = tokenizer.encode("")[1:]
    return [_shortened(row, length, ending) for row in rows]


def _shortened(row: list[int], length: int, ending: list[int]) -> list[int]:
    if len(row) <= length:
        return row
    kept = ending if row[len(row) - len(ending) :] == ending else []
    return row[: length - len(kept)] + kept


def _embedded(
    model: TaskModel, pooling: Pooling, rows: Sequence[Sequence[int]], most_tokens: int
) -> Tensor:
    """`[N, P]`, before it is made of length 1."""
    # Written after each batch: nothing of a batch outlives it but its vectors.
    found: Tensor | None = None
    with evaluating(model), torch.inference_mode():
        for batch in _batches(rows, most_tokens):
            vectors = _vectors(model, pooling, [rows[i] for i in batch])
            if found is None:
                found = torch.empty(len(rows), vectors.shape[1])
            found[batch] = vectors.cpu()
    return torch.empty(0, getattr(model.config, "d_model")) if found is None else found  # noqa: B009


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
