"""The LLaMA family's types as rows, and its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Config, Row, hf
from polyhead.models.heads import CAUSAL_HEADS
from polyhead.models.rope import read_scaling

QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
    "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
# What is read nowhere in these types must not act here either.
PLAIN = {"qk_norm": None, "use_window": True, "max_window_layers": 0, "layer_types": None}
QWEN2_BIAS = {"qkv_bias": True, "out_bias": False, "qk_norm": None}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}

# What transformers' newer decoders share.
DECODER: dict[str, Any] = {"prefix": "model.", "heads": CAUSAL_HEADS}

ROWS = (
    Row("llama", "Llama", **DECODER, implied={**PLAIN, "window": None}),
    Row("mistral", "Mistral", **DECODER, absent=MISTRAL, implied=PLAIN),
    Row(
        "qwen2",
        "Qwen2",
        **DECODER,
        absent=QWEN,
        implied={"qkv_bias": True, "out_bias": False, "qk_norm": None},
    ),
    Row(
        "qwen3",
        "Qwen3",
        **DECODER,
        absent={**QWEN, "head_dim": 128},
        implied={"qk_norm": "head"},
    ),
)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """Sizes and options of a LLaMA-like decoder.

    num_kv_heads and head_dim: None follows num_heads and d_model. window: keys a query sees, in
    the layers that `layer_types` calls sliding, else in those from `max_window_layers` on.
    qk_norm: None, "head" (Qwen3: each head by itself) or "width" (OLMoE: all heads together).
    """

    vocab_size: int = hf("vocab_size")
    d_model: int = hf("hidden_size")
    d_ff: int = hf("intermediate_size")
    num_layers: int = hf("num_hidden_layers")
    num_heads: int = hf("num_attention_heads")
    num_kv_heads: int | None = hf("num_key_value_heads", default=None)
    head_dim: int | None = hf("head_dim", default=None)
    max_seq_len: int = hf("max_position_embeddings", default=2048)
    norm_eps: float = hf("rms_norm_eps", default=1e-6)
    activation: str = hf("hidden_act", default="silu", read=read_activation, write=write_activation)
    rope_base: float = hf(
        "rope_scaling.rope_theta",
        "rope_parameters.rope_theta",
        "rope_theta",
        default=10000.0,
        fresh="rope_theta",
    )
    rope_scaling: Mapping[str, Any] | None = hf(
        "rope_scaling", "rope_parameters", default=None, read=read_scaling
    )
    tie_embeddings: bool = hf("tie_word_embeddings", default=False)
    qkv_bias: bool = hf("attention_bias", default=False)
    out_bias: bool = hf("attention_bias", default=False)
    ffn_bias: bool = hf("mlp_bias", default=False)
    qk_norm: str | None = None
    window: int | None = hf("sliding_window", default=None, read=lambda value: value or None)
    use_window: bool = hf("use_sliding_window", default=True)
    max_window_layers: int = hf("max_window_layers", default=0)
    layer_types: tuple[str, ...] | None = hf(
        "layer_types", default=None, read=lambda value: value and tuple(value), write=list
    )
    dropout: float = hf("attention_dropout", default=0.0)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        row = self.row(self.model_type)
        # A scaling given here is held to the same rules as one read from a file.
        object.__setattr__(self, "rope_scaling", read_scaling(self.rope_scaling))
        if self.qk_norm not in (None, "head", "width"):
            raise ConfigError(f"qk_norm is {self.qk_norm!r}; it must be None, 'head' or 'width'")
        if self.head_dim is None:
            if self.d_model % self.num_heads:
                raise ConfigError(
                    f"d_model {self.d_model} does not divide into {self.num_heads} heads"
                )
            if "head_dim" in row.absent:
                # Left out, it would mean the type's own width.
                object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        if self.num_kv_heads is None and "num_key_value_heads" in row.absent:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.window is None and not self.source and "use_window" not in row.implied:
            object.__setattr__(self, "use_window", False)
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        named = self.num_layers if self.layer_types is None else len(self.layer_types)
        if named != self.num_layers:
            raise ConfigError(f"layer_types names {named} layers of {self.num_layers}")
        for kind in self.layer_types or ():
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(f"layer type {kind!r} is not full_attention or sliding_attention")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def width(self) -> int:
        """The width of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def windows(self) -> list[int | None]:
        """Each layer's window."""
        if not self.use_window:
            return [None] * self.num_layers
        sliding = [i >= self.max_window_layers for i in range(self.num_layers)]
        if self.layer_types is not None:
            sliding = [kind == "sliding_attention" for kind in self.layer_types]
        return [self.window if slides else None for slides in sliding]
