"""DeBERTa's configuration: version 1, and versions 2 and 3, which differ in their values alone."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.deberta_heads import DECODERS, HEADS
from polyhead.nn.disentangled import TERMS

PREFIX = "deberta."
POSITIONS = PREFIX + "embeddings.position_embeddings.weight"
# What a file that says nothing means; a fresh model is as version 3 was released.
ABSENT = {
    "relative_attention": False,
    "pos_att_type": None,
    "position_buckets": -1,
    "share_att_key": False,
    "norm_rel_ebd": "none",
    "position_biased_input": True,
    "legacy": True,
}
HARMLESS = frozenset("padding_idx gradient_checkpointing pooler_size".split())
ROWS = (
    Row(
        "deberta", "Deberta", PREFIX, HEADS,
        absent={**ABSENT, "vocab_size": 50265},
        implied={
            "position_buckets": -1, "shares": False, "norm_table": False, "conv_width": 0,
            "conv_groups": 1, "conv_activation": "tanh", "splits": False,
        },
        fixed={"talking_head": False, "z_steps": 0}, harmless=HARMLESS,
    ),
    Row(
        "deberta-v2", "DebertaV2", PREFIX, HEADS,
        absent={**ABSENT, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
                "intermediate_size": 6144},
        implied={"splits": True}, fixed={"z_steps": 0}, harmless=HARMLESS,
    ),
)  # fmt: skip


def _read_terms(value: Any) -> tuple[str, ...]:
    listed = value.lower().split("|") if isinstance(value, str) else value or ()
    terms = tuple(term.strip() for term in listed)
    if not set(terms) <= set(TERMS) or len(set(terms)) < len(terms):
        raise ConfigError(
            f"pos_att_type is {value!r}; Polyhead knows {' and '.join(TERMS)}, each once"
        )
    return terms


def _read_norm(value: str) -> bool:
    return "layer_norm" in [part.strip() for part in value.lower().split("|")]


def _write_norm(value: bool) -> str:
    return "layer_norm" if value else "none"


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Config):
    """Sizes and options of DeBERTa.

    terms: what distances add to a score. position_buckets, reach: of the table of distances; below
    1, a row a distance, and as far as max_seq_len. shares: distances use the tokens' projections.
    biased_input: positions are added to the tokens. conv_width: of a convolution beside the first
    layer, 0 for none. embedding_width: None is d_model. splits: queries, keys and values are stored
    apart. decoder: "enhanced" is the paper's; "plain" and "legacy" read the last layer, and the
    latter is stored as transformers stores it.
    """

    kind: ClassVar[str] = "encoder"

    vocab_size: int = hf("vocab_size", default=128100)
    d_model: int = hf("hidden_size", default=768)
    d_ff: int = hf("intermediate_size", default=3072)
    num_layers: int = hf("num_hidden_layers", default=12)
    num_heads: int = hf("num_attention_heads", default=12)
    head_dim: int | None = hf("attention_head_size", default=None)
    embedding_width: int | None = hf("embedding_size", default=None)
    max_seq_len: int = hf("max_position_embeddings", default=512)
    type_vocab_size: int = hf("type_vocab_size", default=0)
    relative: bool = hf("relative_attention", default=True)
    terms: tuple[str, ...] = hf("pos_att_type", default=TERMS, read=_read_terms, write="|".join)
    reach: int = hf("max_relative_positions", default=-1)
    position_buckets: int = hf("position_buckets", default=256)
    shares: bool = hf("share_att_key", default=True)
    norm_table: bool = hf("norm_rel_ebd", default=True, read=_read_norm, write=_write_norm)
    biased_input: bool = hf("position_biased_input", default=False)
    conv_width: int = hf("conv_kernel_size", default=0)
    conv_groups: int = hf("conv_groups", default=1)
    conv_activation: str = hf(
        "conv_act", default="tanh", read=read_activation, write=write_activation
    )
    activation: str = hf("hidden_act", default="gelu", read=read_activation, write=write_activation)
    norm_eps: float = hf("layer_norm_eps", default=1e-7)
    decoder: str = hf(
        "legacy",
        default="enhanced",
        read=lambda legacy: "legacy" if legacy else "plain",
        write=lambda decoder: decoder == "legacy",
    )
    tie_embeddings: bool = hf("tie_word_embeddings", default=True)
    splits: bool = True
    dropout: float = hf("hidden_dropout_prob", default=0.1)
    attention_dropout: float = hf("attention_probs_dropout_prob", default=0.1)
    pooler_activation: str = hf(
        "pooler_hidden_act", default="gelu", read=read_activation, write=write_activation
    )
    pooler_dropout: float = hf("pooler_dropout", default=0.0)
    pooler_width: int | None = hf("pooler_hidden_size", default=None)
    head_dropout: float | None = hf("cls_dropout", default=None)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        head_width(self.d_model, self.num_heads, self.head_dim)
        if self.pooler_width not in (None, self.d_model):
            raise ConfigError(f"pooler_width is {self.pooler_width}; it is d_model, {self.d_model}")
        if self.conv_width and not self.conv_width % 2:
            raise ConfigError(f"conv_width is {self.conv_width}; it must be odd, or 0 for none")
        if self.conv_width and self.num_layers < 2:
            raise ConfigError(
                "a convolution stands between two layers; use num_layers of 2 or more"
            )
        half = self.position_buckets // 2
        if self.relative and self.buckets and (half < 1 or self.max_distance - 1 <= half):
            raise ConfigError(
                f"{self.position_buckets} buckets over a reach of {self.max_distance} cannot be; "
                "use 2 buckets or more, and a reach above half of them"
            )
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder is {self.decoder!r}; choose {', '.join(DECODERS)}")
        if self.decoder == "enhanced" and (self.biased_input or self.embedding_width is not None):
            raise ConfigError(
                "decoder 'enhanced' is where positions come in: it needs biased_input=False and "
                "embedding_width=None; choose 'plain' for another"
            )

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    def as_stored(self, names: Collection[str]) -> Self:
        """The config with the masked-LM decoder that a checkpoint's names tell.

        Microsoft's files hold positions that the input does not take; transformers discards them,
        and writes a head under `cls.predictions` or `lm_predictions`.
        """
        if any(name.startswith("cls.predictions.") for name in names):
            return replace(self, decoder="legacy")
        if POSITIONS in names and not self.biased_input:
            return replace(self, decoder="enhanced", tie_embeddings=True)
        if any(name.startswith("lm_predictions.") for name in names):
            return replace(self, decoder="plain", tie_embeddings=True)
        return self

    @property
    def width(self) -> int:
        """The width of a head."""
        return head_width(self.d_model, self.num_heads, self.head_dim)

    @property
    def table_width(self) -> int:
        """Of the tables of tokens, types and positions."""
        return self.d_model if self.embedding_width is None else self.embedding_width

    @property
    def max_distance(self) -> int:
        """The furthest distance told from further ones."""
        return self.reach if self.reach > 0 else self.max_seq_len

    @property
    def buckets(self) -> int | None:
        """Of distances; None where each has its own."""
        return self.position_buckets if self.position_buckets > 0 else None
