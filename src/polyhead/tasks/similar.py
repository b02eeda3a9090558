"""Which texts are like another: ranking by the cosine of their embeddings. N texts, E width."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.models.model import TaskModel
from polyhead.tasks.batching import check_texts
from polyhead.tasks.embed import embed
from polyhead.text.tokenizer import Tokenizer

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Match:
    """A text, its number among the texts, and the cosine to the query."""

    text: str
    index: int
    score: float


class Similar:
    """Texts to search, embedded once: `Similar(model, tokenizer, texts)("a query", top_k=3)`."""

    def __init__(
        self, model: TaskModel, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 32
    ) -> None:
        if isinstance(texts, str) or not texts:
            raise DataError("there is nothing to search; give a list of texts")
        check_texts(texts)
        self.model, self.tokenizer, self.texts = model, tokenizer, list(texts)
        self.batch_size = batch_size
        self.embeddings = self._embed(self.texts)

    def __call__(self, queries: str | Sequence[str], *, top_k: int = 5) -> list[list[Match]]:
        """For each query its `top_k` nearest texts, the nearest first, in the order of queries."""
        queries = [queries] if isinstance(queries, str) else list(queries)
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be at least 1")
        check_texts(queries, "query")
        found: list[list[Match]] = []
        for some in self._embed(queries).split(_QUERIES_AT_ONCE):
            cosines = some @ self.embeddings.T
            # Stable, so that of texts that are alike the first comes first.
            scores, order = cosines.sort(dim=1, descending=True, stable=True)
            best, at = scores[:, :top_k].tolist(), order[:, :top_k].tolist()
            found += [
                [Match(self.texts[i], i, score) for i, score in zip(row, own, strict=True)]
                for row, own in zip(at, best, strict=True)
            ]
        return found

    def _embed(self, texts: list[str]) -> Tensor:
        """`[N, E]`, each of length 1."""
        if not texts:
            return torch.empty(0, self.embeddings.shape[1])
        found = embed(self.model, self.tokenizer, texts, batch_size=self.batch_size)
        assert isinstance(found, Tensor)
        return F.normalize(found.float(), dim=-1)
