"""One vector for each text: the mean of a model's hidden states over its tokens."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.mode import evaluating
from polyhead.generate.prompts import encode_prompt
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

_TOKENS_A_ROW = 128


def embed(
    model: TaskModel,
    tokenizer: Tokenizer,
    texts: str | Sequence[str],
    *,
    batch_size: int = 32,
    normalize_embeddings: bool = True,
    convert_to_tensor: bool = True,
) -> "Tensor | np.ndarray":
    """Embeddings float32 `[N, E]` in the order of `texts`; `[E]` for a single string.

    A text's vector is the mean over its own tokens, whatever shares its batch. Texts longer than
    the model are cut off at the end. normalize_embeddings: to length 1. convert_to_tensor: False
    gives a numpy array. batch_size: texts at once at 128 tokens each; more of shorter ones.
    Errors: DataError for an empty text where the tokenizer has no token to stand for it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    most = getattr(model.config, "max_seq_len", None)
    vocab_size = getattr(model.config, "vocab_size")  # noqa: B009
    wanted = [texts] if isinstance(texts, str) else texts
    rows = [encode_prompt(text, tokenizer, vocab_size)[:most] for text in wanted]
    found = torch.empty(len(rows), getattr(model.config, "d_model"))  # noqa: B009
    with evaluating(model), torch.inference_mode():
        for batch in _batches(rows, batch_size * _TOKENS_A_ROW):
            found[batch] = _means(model, [rows[i] for i in batch]).cpu()
    if normalize_embeddings:
        found = F.normalize(found, dim=-1)
    answer = found[0] if isinstance(texts, str) else found
    return answer.to(model.device) if convert_to_tensor else answer.numpy()


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


def _means(model: TaskModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[b, E]` of ragged rows of ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).to(model.device)
    hidden = model.backbone(ids.to(model.device), attention_mask=mask).float()
    return hidden.masked_fill(~mask[:, :, None], 0).sum(1) / mask.sum(1, keepdim=True)
