"""The LSTM language model: one state, rewritten token by token (Hochreiter and Schmidhuber 1997).

Layers, and dropout between them, as in Zaremba et al. 2014. `B` rows, `T` tokens, `E` width,
`L` layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from polyhead.models.backbone import advance
from polyhead.models.config import Config, Row, hf
from polyhead.models.heads import language
from polyhead.models.keys import Rule, Rules
from polyhead.nn.cache import Caches
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.mask import Mask, as_mask
from polyhead.nn.state import StateCache

ROWS = (Row("lstm", "LSTM", "model.", {"lm": language()}),)


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(Config):
    """Sizes of an LSTM language model; unless named, the medium one's of Zaremba et al.

    dropout: of what goes up to the next layer, not of what goes on to the next token.
    """

    vocab_size: int = hf("vocab_size", default=10000)
    d_model: int = hf("hidden_size", default=650)
    num_layers: int = hf("num_hidden_layers", default=2)
    max_seq_len: int = hf("max_position_embeddings", default=2048)
    dropout: float = hf("dropout", default=0.0)
    tie_embeddings: bool = hf("tie_word_embeddings", default=False)
    init_std: float = hf("initializer_range", default=0.02)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS


class LSTM(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.dropout = Dropout(config.dropout)
        between = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.d_model, config.d_model, config.num_layers, batch_first=True, dropout=between
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        given = as_mask(attention_mask, input_ids.shape)
        if given.segments is not None or given.allow or given.window is not None:
            raise ValueError(
                "an lstm reads all that is before a token in its row: a mask can hide padding alone"
            )
        x = self.dropout(self.embedding(input_ids))
        if caches is None:
            return self.dropout(self._read(x, given.keep))
        advance(input_ids, given, position_ids, caches)
        y = self._go_on(x, given.keep, caches)
        caches.end()
        return self.dropout(y)

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """The state before any text; it is as large after any number of tokens."""
        c, like = self.config, self.embedding.weight
        return Caches([StateCache(batch_size, c.num_layers, c.d_model, like)])

    @torch.no_grad()
    def initialize(self) -> None:
        """A forget gate begins open, so that gradients reach far back (Jozefowicz et al. 2015)."""
        for name, value in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                value.view(4, -1)[1] = 1.0  # torch's order: input, forget, cell, output

    def _read(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """States of whole texts `[B, T, E]`."""
        if keep is None:
            return self.lstm(x)[0]
        # Each row's tokens go to its front, where padding comes too late to change them.
        order = keep.logical_not().long().argsort(dim=1, stable=True)
        y = self.lstm(_permuted(x, order))[0]
        return _permuted(y, order.argsort(1))

    def _go_on(self, x: Tensor, keep: Tensor | None, caches: Caches) -> Tensor:
        """States of tokens `[B, T, E]` that follow what was read, padded on the right."""
        cache = caches[0]
        assert isinstance(cache, StateCache)
        if keep is None:
            y, (hidden, cell) = self.lstm(x, cache.states())
            cache.keep(hidden, cell, torch.ones_like(cache.lengths, dtype=torch.bool))
            return y
        counts = keep.sum(1)
        # A row of padding alone is run as one token, which is forgotten.
        lengths = counts.clamp(min=1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (hidden, cell) = self.lstm(packed, cache.states())
        cache.keep(hidden, cell, counts > 0)
        return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """Tokens `[B, T, E]` in the order `[B, T]` of each row."""
    return x.gather(1, order[..., None].expand_as(x))


def rules(config: LSTMConfig) -> Rules:
    """The checkpoint map: torch's own names."""
    parts = [f"{kind}_{of}_l{{i}}" for kind in ("weight", "bias") for of in ("ih", "hh")]
    return (
        Rule("model.embed_tokens.weight", "embedding.weight"),
        *(Rule(f"model.lstm.{part}", f"lstm.{part}") for part in parts),
    )
