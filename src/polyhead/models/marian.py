"""Marian: the transformer of the paper, as the translators of OPUS have it (Tiedemann et al. 2020).

Two stacks of models/transformer.py, post-norm, with sinusoids that are not interleaved and a bias
on the logits (Junczys-Dowmunt et al. 2018).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.heads import HeadKind, both
from polyhead.models.keys import Dropped, Rule, Rules, Tied
from polyhead.models.transformer import Stack
from polyhead.models.transformer_parts import TransformerConfig
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.head import LanguageHead


class TranslationHead(LanguageHead):
    """Logits of the target's vocabulary, with a bias `[1, V]` that is not trained."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size)
        del self.bias
        self.register_buffer("bias", torch.zeros(1, vocab_size))


def head_rules(config: "MarianConfig") -> Rules:
    """The checkpoint map of the head."""
    weight = (
        Tied("lm_head.weight", config.target_table)
        if config.tie_embeddings
        else Rule("lm_head.weight", "weight")
    )
    return weight, Rule("final_logits_bias", "bias")


HEADS = {
    "lm": HeadKind(
        "MTModel",
        lambda config: TranslationHead(config.d_model, config.target_vocab_size),
        head_rules,
    )
}
ROWS = (
    Row(
        "marian",
        "Marian",
        "model.",
        HEADS,
        harmless=frozenset(
            """encoder_layerdrop decoder_layerdrop activation_dropout num_hidden_layers
            static_position_embeddings extra_pos_embeddings classif_dropout
            gradient_checkpointing""".split()
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class MarianConfig(Config):
    """Sizes and options of Marian.

    Fields without `decoder_` are the encoder's, or both stacks'; of the decoder's, None is as
    many; of a head_dim, an equal share of d_model. vocab_size: of the source. share_embeddings:
    one table for source and target. pad_id: None is the last of the vocabulary; start_id,
    which the decoder reads first: as pad_id.
    """

    vocab_size: int = hf("vocab_size", default=58101)
    decoder_vocab_size: int | None = hf("decoder_vocab_size", default=None)
    d_model: int = hf("d_model", default=1024)
    d_ff: int = hf("encoder_ffn_dim", default=4096)
    decoder_d_ff: int | None = hf("decoder_ffn_dim", default=None)
    num_layers: int = hf("encoder_layers", default=12)
    num_decoder_layers: int | None = hf("decoder_layers", default=None)
    num_heads: int = hf("encoder_attention_heads", default=16)
    num_decoder_heads: int | None = hf("decoder_attention_heads", default=None)
    head_dim: int | None = hf("head_dim", default=None)
    decoder_head_dim: int | None = hf("decoder_head_dim", default=None)
    max_seq_len: int = hf("max_position_embeddings", default=1024)
    activation: str = hf(
        "activation_function", default="gelu", read=read_activation, write=write_activation
    )
    scale_embeddings: bool = hf("scale_embedding", default=False)
    share_embeddings: bool = hf("share_encoder_decoder_embeddings", default=True)
    tie_embeddings: bool = hf("tie_word_embeddings", default=True)
    dropout: float = hf("dropout", default=0.0)
    attention_dropout: float = hf("attention_dropout", default=0.0)
    init_std: float = hf("init_std", default=0.02)
    pad_id: int | None = hf("pad_token_id", default=None)
    start_id: int | None = hf("decoder_start_token_id", default=None)
    kind = "encoder-decoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        # Said in full: where a file is silent, transformers has the sizes and ids of one of OPUS'.
        implied = {
            "decoder_d_ff": self.d_ff,
            "num_decoder_layers": self.num_layers,
            "num_decoder_heads": self.num_heads,
            "pad_id": self.vocab_size - 1,
        }
        for name, value in implied.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.start_id is None:
            object.__setattr__(self, "start_id", self.pad_id)
        for side in self.encoder, self.decoder:
            head_width(side.d_model, side.num_heads, side.head_dim)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def target_vocab_size(self) -> int:
        """Tokens that can be written."""
        own = None if self.share_embeddings else self.decoder_vocab_size
        return own or self.vocab_size

    @property
    def has_one_table(self) -> bool:
        """Whether encoder and decoder read the same embedding."""
        return self.share_embeddings and self.tie_embeddings

    @property
    def target_table(self) -> str:
        """The embedding that the head reads, by its name in a checkpoint."""
        return "model.shared.weight" if self.has_one_table else "model.decoder.embed_tokens.weight"

    @property
    def encoder(self) -> TransformerConfig:
        """The encoder as a transformer."""
        return self._stack(self.d_ff, self.num_layers, self.num_heads, self.head_dim)

    @property
    def decoder(self) -> TransformerConfig:
        """The decoder as a transformer."""
        return self._stack(
            self.decoder_d_ff or self.d_ff,
            self.num_decoder_layers or self.num_layers,
            self.num_decoder_heads or self.num_heads,
            self.decoder_head_dim,
        )

    def _stack(
        self, d_ff: int, num_layers: int, num_heads: int, head_dim: int | None
    ) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            max_seq_len=self.max_seq_len,
            position="marian",
            activation=self.activation,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )


class Marian(EncoderDecoder):
    """Source and target ids to the target's hidden states `[B, T, E]`."""

    def __init__(self, config: MarianConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.d_model**0.5 if config.scale_embeddings else 1.0
        self.embedding = TokenEmbedding(config.target_vocab_size, config.d_model, scale)
        self.source_embedding = (
            None
            if config.has_one_table
            else TokenEmbedding(config.vocab_size, config.d_model, scale)
        )
        self.encoder = Stack(config.encoder, is_causal=False, has_memory=False)
        self.decoder = Stack(config.decoder, is_causal=True, has_memory=True)

    def embed_source(self, input_ids: Tensor) -> Tensor:
        return (self.source_embedding or self.embedding)(input_ids)


def rules(config: MarianConfig) -> Rules:
    """The checkpoint map. Sinusoids are computed; what a file stores of them is passed over."""
    found: list[Rule | Dropped | Tied] = []
    if config.has_one_table:
        found += [Rule("model.shared.weight", "embedding.weight")]
        found += [
            Tied(f"model.{stack}.embed_tokens.weight", "model.shared.weight")
            for stack in ("encoder", "decoder")
        ]
    else:
        found += [
            Rule("model.encoder.embed_tokens.weight", "source_embedding.weight"),
            Rule("model.decoder.embed_tokens.weight", "embedding.weight"),
            Dropped("model.shared.weight"),
        ]
    attentions = [("self_attn", "attention"), ("encoder_attn", "cross")]
    for stack, count in (("encoder", 1), ("decoder", 2)):
        layer, ours = f"model.{stack}.layers.{{i}}.", f"{stack}.layers.{{i}}."
        pairs = [("fc1", "ffn.up"), ("fc2", "ffn.down"), ("final_layer_norm", "ffn_norm")]
        for theirs, mine in attentions[:count]:
            pairs += [
                (f"{theirs}.{part}_proj", f"{mine}.{part}") for part in ("q", "k", "v", "out")
            ]
            pairs.append((f"{theirs}_layer_norm", f"{mine}_norm"))
        found += [rule for t, o in pairs for rule in both(layer + t, ours + o)]
        found.append(Dropped(f"model.{stack}.embed_positions.weight"))
    return tuple(found)
