"""The neural bigram: the next token's logits from the current token alone.

A baseline that trains, saves and generates like every family. `E` width, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead.models.backbone import place
from polyhead.models.config import Config, Row, hf
from polyhead.models.heads import language
from polyhead.models.keys import Rule, Rules
from polyhead.nn.cache import Cache, Caches, GrowingCache, StaticCache
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.mask import Mask

ROWS = (Row("bigram", "Bigram", "model.", {"lm": language()}),)


@dataclass(frozen=True, kw_only=True)
class BigramConfig(Config):
    """Sizes of a neural bigram. With d_model = vocab_size, every table of logits can be had."""

    vocab_size: int = hf("vocab_size")
    d_model: int = hf("hidden_size", default=256)
    max_seq_len: int = hf("max_position_embeddings", default=2048)
    init_std: float = hf("initializer_range", default=0.02)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS


class Bigram(nn.Module):
    """Token ids `[B, T]` to their embeddings `[B, T, E]`: nothing looks back."""

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if caches is not None:
            # Nothing is kept, but the rows' lengths are counted as everywhere.
            place(input_ids, attention_mask, position_ids, caches, [None], None, torch.float32)
            caches.end()
        return self.embedding(input_ids)

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """One empty cache of no width, which holds the rows' lengths."""
        like = self.embedding.weight
        cache: Cache = GrowingCache(batch_size, 1, 0, like)
        if max_len is not None:
            cache = StaticCache(batch_size, 1, 0, max_len, like)
        return Caches([cache])


def rules(config: BigramConfig) -> Rules:
    """The checkpoint map."""
    return (Rule("model.embed_tokens.weight", "embedding.weight"),)
