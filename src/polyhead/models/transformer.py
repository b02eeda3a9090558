"""The transformer of the paper, and the one you build yourself.

Encoder, decoder, or both (Vaswani et al. 2017), with position, norm, activation, heads, sparsity
and experts chosen in the config. The defaults are the paper's.
"""

from functools import partial

import torch
from torch import Tensor, nn

from polyhead.models.backbone import CAUSAL, place
from polyhead.models.encoder_decoder import EncoderDecoder
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
from polyhead.nn.cache import Caches
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.mask import EVERYTHING, Lowered, Mask
from polyhead.nn.norm import make_norm
from polyhead.nn.position import Shaw


class Stack(nn.Module):
    """Embedded tokens through the layers of an encoder or a decoder: `[B, T, E]`.

    is_causal: a token sees those before it. has_memory: layers attend to a memory too.
    """

    def __init__(self, config: TransformerConfig, is_causal: bool, has_memory: bool) -> None:
        super().__init__()
        self.config, self.has_memory = config, has_memory
        self.windows = config.windows
        self.mask = sparse_pattern(config) & (CAUSAL if is_causal else Mask())
        self.positions = absolute_position(config)
        self.relative = relative_position(config, is_causal)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(self.make_block() for _ in range(config.num_layers))
        # Shaw's tables belong to each layer; other positions to the stack.
        self.shaw = nn.ModuleList(
            Shaw(config.width, config.max_distance)
            for _ in range(config.num_layers if config.position == "shaw" else 0)
        )
        final = make_norm(config.norm, config.d_model, config.norm_eps)
        self.norm = final if config.norm_first else nn.Identity()

    def make_block(self) -> TransformerBlock:
        """One layer."""
        config = self.config
        on_weights = config.attention_dropout
        attention = partial(
            MultiHeadAttention,
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.bias,
            dropout=config.dropout if on_weights is None else on_weights,
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
        placed = place(
            input_ids, attention_mask, position_ids, caches, self.windows, self.relative,
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


class Transformer(EncoderDecoder):
    """An encoder, a decoder or both over one embedding: hidden states `[B, T, E]`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.d_model**0.5 if config.scale_embeddings else 1.0
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, scale)
        both = config.kind == "encoder-decoder"
        self.encoder = Stack(config, False, False) if config.kind != "decoder" else None
        self.decoder = Stack(config, True, both) if config.kind != "encoder" else None


def rules(config: TransformerConfig) -> Rules:
    """The checkpoint map: our own names below a prefix."""
    with torch.device("meta"):
        names = list(Transformer(config).state_dict())
    return tuple(Rule("transformer." + name, name) for name in names)
