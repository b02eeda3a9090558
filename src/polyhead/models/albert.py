"""ALBERT: BERT whose tables are narrow and whose layers are shared (Lan et al. 2020).

Words, positions and types live at a width of their own, which one dense layer widens. A few groups
of layers serve all depths; sentence order takes the place of next sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.bert import Bert, BertConfig, embedding_rules
from polyhead.models.bert_heads import pooled_classifier, tanh_pooler, vocabulary
from polyhead.models.config import Row, hf
from polyhead.models.heads import HeadKind, both, several, span_head, token_classifier
from polyhead.models.keys import Rules
from polyhead.nn.head import MaskedLanguageHead
from polyhead.nn.mask import Lowered


def _masked_language(config: Any) -> MaskedLanguageHead:
    return MaskedLanguageHead(
        config.d_model,
        config.vocab_size,
        config.activation,
        config.norm_eps,
        config.embedding_width,
    )


def _language_rules(config: Any) -> Rules:
    embedding = "albert.embeddings.word_embeddings.weight"
    return (
        *both("predictions.dense", "dense"),
        *both("predictions.LayerNorm", "norm"),
        *vocabulary(config, embedding, "predictions.decoder", "predictions.bias"),
    )


_LM = HeadKind("ForMaskedLM", _masked_language, _language_rules)
_SOP = pooled_classifier("ForSentenceOrder", "sop_classifier.classifier", 2)
HEADS: Mapping[str, HeadKind] = {
    "lm": _LM,
    "classify": pooled_classifier(),
    "tag": token_classifier(),
    "answer": span_head(),
    "sop": _SOP,
    "pretraining": several("ForPreTraining", {"lm": _LM, "sop": _SOP}),
}
ROWS = (
    Row(
        "albert",
        "Albert",
        "albert.",
        HEADS,
        tanh_pooler,
        keys={"classifier_dropout": "classifier_dropout_prob"},
        absent={
            "vocab_size": 30000,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "intermediate_size": 16384,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        implied={"offset_by_padding": False},
        fixed={"position_embedding_type": "absolute", "num_memory_blocks": 0, "layers_to_keep": []},
        harmless=frozenset({"down_scale_factor", "gap_size", "net_structure_type"}),
    ),
)


@dataclass(frozen=True, kw_only=True)
class AlbertConfig(BertConfig):
    """BERT's options and those of sharing; the defaults are those of ALBERT-base.

    num_groups: groups of layers, each of which serves as many depths in turn. group_layers:
    layers in a group.
    """

    vocab_size: int = hf("vocab_size", default=30000)
    embedding_width: int = hf("embedding_size", default=128)  # pyright: ignore[reportIncompatibleMethodOverride]
    num_groups: int = hf("num_hidden_groups", default=1)
    group_layers: int = hf("inner_group_num", default=1)
    activation: str = hf(
        "hidden_act", default="gelu_tanh", read=read_activation, write=write_activation
    )
    dropout: float = hf("hidden_dropout_prob", default=0.0)
    attention_dropout: float = hf("attention_probs_dropout_prob", default=0.0)
    head_dropout: float = hf("classifier_dropout", default=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_groups", "group_layers", "embedding_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS


class Albert(Bert):
    """Token ids `[B, T]` to hidden states `[B, T, E]`, through the same layers again and again."""

    def __init__(self, config: AlbertConfig) -> None:
        self.config: AlbertConfig
        super().__init__(config)
        self.widen = nn.Linear(config.embedding_width, config.d_model)

    def make_layers(self) -> nn.ModuleList:
        """Groups of layers."""
        config = self.config
        return nn.ModuleList(
            nn.ModuleList(self.make_block() for _ in range(config.group_layers))
            for _ in range(config.num_groups)
        )

    def encode(self, x: Tensor, mask: Lowered, at: Tensor) -> Tensor:
        x = self.widen(x)
        for depth in range(self.config.num_layers):
            # Divided as the published checkpoints were trained, rounding and all.
            group = int(depth / (self.config.num_layers / self.config.num_groups))
            for layer in self.layers[group]:  # pyright: ignore[reportGeneralTypeIssues]
                x = layer(x, mask, None, at)
        return x


def rules(config: AlbertConfig) -> Rules:
    """The checkpoint map of backbone and pooler."""
    layer, ours = "albert.encoder.albert_layer_groups.{g}.albert_layers.{i}.", "layers.{g}.{i}."
    parts = {
        "attention.query": "attention.q",
        "attention.key": "attention.k",
        "attention.value": "attention.v",
        "attention.dense": "attention.out",
        "attention.LayerNorm": "attention_norm",
        "ffn": "ffn.up",
        "ffn_output": "ffn.down",
        "full_layer_layer_norm": "ffn_norm",
    }
    return (
        *embedding_rules("albert."),
        *both("albert.encoder.embedding_hidden_mapping_in", "widen"),
        *(rule for name, own in parts.items() for rule in both(layer + name, ours + own)),
        *both("albert.pooler", "pooler.dense"),
    )
