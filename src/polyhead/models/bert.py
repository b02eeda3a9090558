"""BERT and its kin: post-norm encoders with learned positions (Devlin et al. 2019).

RoBERTa (Liu et al. 2019) counts positions after the padding id; DistilBERT (Sanh et al. 2019) has
no token types and no pooler.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.backbone import place
from polyhead.models.bert_heads import BERT, DISTILBERT, ROBERTA, tanh_pooler
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.heads import both
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import PostNormBlock
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.feedforward import FeedForward
from polyhead.nn.mask import Lowered, Mask
from polyhead.nn.norm import LayerNorm
from polyhead.nn.position import LearnedPositions

# A decoder would see no token after its own.
FIXED = {"position_embedding_type": "absolute", "is_decoder": False}
# Of a pooler that no release had, and of how the first files were trained.
HARMLESS = frozenset(
    """directionality gradient_checkpointing pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type qa_dropout tie_weights_""".split()
)
ROWS = (
    Row(
        "bert", "Bert", "bert.", BERT, tanh_pooler,
        fixed=FIXED, harmless=HARMLESS, implied={"offset_by_padding": False},
    ),
    *(
        Row(
            name, stem, "roberta.", ROBERTA, tanh_pooler,
            fixed=FIXED, harmless=HARMLESS, implied={"offset_by_padding": True},
            absent={"pad_token_id": 1, "vocab_size": 50265 if name == "roberta" else 30522},
        )
        for name, stem in (
            ("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"),
        )
    ),
    Row(
        "distilbert", "DistilBert", "distilbert.", DISTILBERT,
        keys={
            "hidden_size": "dim", "intermediate_size": "hidden_dim",
            "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "hidden_act": "activation", "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        absent={"n_layers": 6},
        implied={
            "type_vocab_size": 0, "norm_eps": 1e-12, "offset_by_padding": False,
            "head_dropout": 0.2,
        },
        # The tables that began as sinusoids are stored like any other.
        harmless=HARMLESS | {"sinusoidal_pos_embds", "seq_classif_dropout"},
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """Sizes and options of a BERT-like encoder.

    head_dim: None is an equal share of d_model. type_vocab_size: 0 for no token types.
    head_dropout: before a classifier, None: `dropout`.
    offset_by_padding: positions begin after `pad_id`, and the table holds that much more.
    """

    kind: ClassVar[str] = "encoder"

    vocab_size: int = hf("vocab_size", default=30522)
    d_model: int = hf("hidden_size", default=768)
    d_ff: int = hf("intermediate_size", default=3072)
    num_layers: int = hf("num_hidden_layers", default=12)
    num_heads: int = hf("num_attention_heads", default=12)
    head_dim: int | None = hf("head_dim", default=None)
    max_seq_len: int = hf("max_position_embeddings", default=512)
    type_vocab_size: int = hf("type_vocab_size", default=2)
    norm_eps: float = hf("layer_norm_eps", default=1e-12)
    activation: str = hf("hidden_act", default="gelu", read=read_activation, write=write_activation)
    tie_embeddings: bool = hf("tie_word_embeddings", default=True)
    pad_id: int | None = hf("pad_token_id", default=0)
    offset_by_padding: bool = False
    dropout: float = hf("hidden_dropout_prob", default=0.1)
    attention_dropout: float = hf("attention_probs_dropout_prob", default=0.1)
    head_dropout: float | None = hf("classifier_dropout", default=None)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        head_width(self.d_model, self.num_heads, self.head_dim)
        if self.offset_by_padding and (self.pad_id is None or self.pad_id < 0):
            raise ConfigError(
                f"{self.model_type} counts positions from pad_token_id, which is {self.pad_id}; "
                "name one from 0"
            )

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def offset(self) -> int:
        """The row of the position table that the first token takes."""
        return self.pad_id + 1 if self.offset_by_padding and self.pad_id is not None else 0

    @property
    def embedding_width(self) -> int:
        """The width of the tables."""
        return self.d_model

    @property
    def max_tokens(self) -> int:
        return self.max_seq_len - self.offset


class Bert(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        width, types = config.embedding_width, config.type_vocab_size
        self.embedding = TokenEmbedding(config.vocab_size, width)
        self.positions = LearnedPositions(config.max_seq_len, width)
        self.token_types = Table(types, width) if types else None
        self.embedding_norm = LayerNorm(width, config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.layers = self.make_layers()

    def make_layers(self) -> nn.ModuleList:
        """The stack."""
        return nn.ModuleList(self.make_block() for _ in range(self.config.num_layers))

    def make_block(self) -> PostNormBlock:
        """One layer."""
        config = self.config
        return PostNormBlock(
            MultiHeadAttention(
                config.d_model,
                config.num_heads,
                head_dim=config.head_dim,
                dropout=config.attention_dropout,
            ),
            FeedForward(config.d_model, config.d_ff, config.activation),
            partial(LayerNorm, config.d_model, config.norm_eps),
            dropout=config.dropout,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """token_type_ids `[B, T]`: zeros where none. position_ids: rows of the position table."""
        x = self.embedding(input_ids)
        placed = place(
            input_ids, attention_mask, position_ids, None, [None], None, x.dtype, base=Mask()
        )
        if position_ids is None:
            position_ids = self.places(input_ids, placed.at)
        x = x + self.positions(position_ids)
        if self.token_types is not None:
            kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_types(kinds)
        return self.encode(self.dropout(self.embedding_norm(x)), placed.masks[0], placed.at)

    def encode(self, x: Tensor, mask: Lowered, at: Tensor) -> Tensor:
        """Embedded tokens through the stack."""
        for layer in self.layers:
            x = layer(x, mask, None, at)
        return x

    def places(self, input_ids: Tensor, at: Tensor) -> Tensor:
        """Rows of the position table; RoBERTa's count the ids that are not padding."""
        if not self.config.offset_by_padding:
            return at
        counts = input_ids != self.config.pad_id
        return counts.long().cumsum(1) * counts + self.config.offset - 1


def rules(config: BertConfig) -> Rules:
    """The checkpoint map of backbone and pooler."""
    if config.model_type == "distilbert":
        return _distilbert_rules()
    prefix = config.row(config.model_type).prefix
    layer, ours = prefix + "encoder.layer.{i}.", "layers.{i}."
    parts = {
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "ffn.up",
        "output.dense": "ffn.down",
        "output.LayerNorm": "ffn_norm",
    }
    return (
        *embedding_rules(prefix),
        *(rule for name, own in parts.items() for rule in both(layer + name, ours + own)),
        *both(prefix + "pooler.dense", "pooler.dense"),
    )


def embedding_rules(prefix: str) -> Rules:
    """Token, position and type tables and their norm, as BERT's kin store them."""
    top = prefix + "embeddings."
    return (
        Rule(top + "word_embeddings.weight", "embedding.weight"),
        Rule(top + "position_embeddings.weight", "positions.weight"),
        Rule(top + "token_type_embeddings.weight", "token_types.weight"),
        *both(top + "LayerNorm", "embedding_norm"),
        Dropped(top + "position_ids"),
        Dropped(top + "token_type_ids"),
    )


def _distilbert_rules() -> Rules:
    layer, ours = "distilbert.transformer.layer.{i}.", "layers.{i}."
    parts = {
        "attention.q_lin": "attention.q",
        "attention.k_lin": "attention.k",
        "attention.v_lin": "attention.v",
        "attention.out_lin": "attention.out",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "ffn.up",
        "ffn.lin2": "ffn.down",
        "output_layer_norm": "ffn_norm",
    }
    layers = (rule for name, own in parts.items() for rule in both(layer + name, ours + own))
    return (*embedding_rules("distilbert."), *layers)
