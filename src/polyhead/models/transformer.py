"""The transformer of the paper, and the one you build yourself.

Encoder, decoder, or both (Vaswani et al. 2017), with position, norm, activation, heads, sparsity
and experts chosen in the config. The defaults are the paper's.
"""

from functools import partial

import torch
from torch import Tensor, nn

from polyhead.models.backbone import CAUSAL, make_caches, place
from polyhead.models.keys import Rule, Rules
from polyhead.models.transformer_parts import (
    TransformerConfig,
    absolute_position,
    feedforward,
    relative_position,
    sparse_pattern,
)
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import PostNormBlock, TransformerBlock
from polyhead.nn.cache import Caches, CrossCache
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.mask import EVERYTHING, Lowered, Mask, as_mask
from polyhead.nn.norm import make_norm
from polyhead.nn.position import Shaw


class Stack(nn.Module):
    """Embedded tokens through the layers of an encoder or a decoder: `[B, T, E]`.

    is_causal: a token sees those before it. has_memory: layers attend to a memory too.
    """

    def __init__(self, config: TransformerConfig, is_causal: bool, has_memory: bool) -> None:
        super().__init__()
        self.config, self.has_memory = config, has_memory
        self.mask = sparse_pattern(config) & (CAUSAL if is_causal else Mask())
        self.positions = absolute_position(config)
        self.relative = relative_position(config, is_causal)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self.make_block() for _ in range(config.num_layers))
        # Shaw's tables belong to each layer; other positions to the stack.
        self.shaw = nn.ModuleList(
            Shaw(config.head_dim, config.max_distance)
            for _ in range(config.num_layers if config.position == "shaw" else 0)
        )
        final = make_norm(config.norm, config.d_model, config.norm_eps)
        self.norm = final if config.norm_first else nn.Identity()

    def make_block(self) -> TransformerBlock:
        """One layer."""
        config = self.config
        attention = partial(
            MultiHeadAttention,
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            bias=config.bias,
            dropout=config.dropout,
        )
        return (TransformerBlock if config.norm_first else PostNormBlock)(
            attention(),
            feedforward(config),
            partial(make_norm, config.norm, config.d_model, config.norm_eps),
            cross=attention() if self.has_memory else None,
            dropout=config.dropout,
        )

    def forward(
        self,
        input_ids: Tensor,
        embedded: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Lowered = EVERYTHING,
    ) -> Tensor:
        config = self.config
        placed = place(
            input_ids, attention_mask, position_ids, caches, config.windows, self.relative,
            embedded.dtype, base=self.mask,
        )  # fmt: skip
        x = embedded
        if self.positions is not None:
            x = x + self.positions(placed.at).to(x.dtype)
        x = self.dropout(x)
        cross = caches.cross if caches is not None and caches.cross else [None] * len(self.layers)
        for number, layer in enumerate(self.layers):
            position = self.shaw[number] if len(self.shaw) else placed.positions[number]
            x = layer(
                x, placed.masks[number], position, placed.at, placed.caches[number],
                memory, memory_mask, cross[number],
            )  # fmt: skip
        if caches is not None:
            caches.end()
        return self.norm(x)


class Transformer(nn.Module):
    """An encoder, a decoder or both over one embedding: hidden states `[B, T, E]`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.d_model**0.5 if config.scale_embeddings else 1.0
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, scale)
        both = config.kind == "encoder-decoder"
        self.encoder = Stack(config, False, False) if config.kind != "decoder" else None
        self.decoder = Stack(config, True, both) if config.kind != "encoder" else None

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | Mask | None = None,
        attention_mask: Tensor | Mask | None = None,
        decoder_attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Two sequences for an encoder-decoder; otherwise one, with its mask in second place."""
        if self.encoder is None or self.decoder is None:
            stack = self.encoder or self.decoder
            assert stack is not None
            mask = attention_mask if decoder_input_ids is None else decoder_input_ids
            return stack(input_ids, self.embedding(input_ids), mask, caches, position_ids)
        if not isinstance(decoder_input_ids, Tensor):
            raise ValueError("an encoder-decoder needs decoder_input_ids beside input_ids")
        memory = self.encode(input_ids, attention_mask)
        return self.decode(
            decoder_input_ids, memory, attention_mask, decoder_attention_mask, caches
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor | Mask | None = None) -> Tensor:
        """The memory `[B, S, E]` that a decoder attends to."""
        assert self.encoder is not None, "this transformer has no encoder"
        return self.encoder(input_ids, self.embedding(input_ids), attention_mask)

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        attention_mask: Tensor | Mask | None = None,
        decoder_attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
    ) -> Tensor:
        """Hidden states of the decoder's tokens; `attention_mask` speaks of the memory's."""
        assert self.decoder is not None, "this transformer has no decoder"
        sizes = decoder_input_ids.shape[1], memory.shape[1]
        memory_mask = as_mask(attention_mask, memory.shape[:2]).lower(*sizes, memory.device)
        embedded = self.embedding(decoder_input_ids)
        return self.decoder(
            decoder_input_ids, embedded, decoder_attention_mask, caches,
            memory=memory, memory_mask=memory_mask,
        )  # fmt: skip

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """Empty caches for `batch_size` rows: static of `max_len` positions, or growing."""
        if self.decoder is None:
            raise ValueError("an encoder sees the whole text at once and has no caches")
        config = self.config
        caches = make_caches(
            batch_size, max_len, config.windows,
            config.num_kv_heads or config.num_heads, config.head_dim, self.embedding.weight,
        )  # fmt: skip
        if self.encoder is not None:
            caches.cross = [CrossCache() for _ in range(config.num_layers)]
        return caches


def rules(config: TransformerConfig) -> Rules:
    """The checkpoint map: our own names below a prefix."""
    with torch.device("meta"):
        names = list(Transformer(config).state_dict())
    return tuple(Rule("transformer." + name, name) for name in names)
