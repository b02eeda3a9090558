"""The LLaMA family: Llama 1 to 3.2, SmolLM2, Mistral, Qwen2 and Qwen3 as rows.

Pre-norm RMSNorm, rotary positions, SwiGLU, grouped key/value heads (Touvron et al. 2023).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.backbone import make_caches, place
from polyhead.models.config import Config, Row, hf, read_activation, write_activation
from polyhead.models.keys import Dropped, Rule, Rules, Tied
from polyhead.models.rope import make_rotary, read_scaling
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.cache import Caches
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import GatedFeedForward
from polyhead.nn.mask import Mask
from polyhead.nn.norm import RMSNorm

QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}

ROWS = (
    Row("llama", "LlamaForCausalLM"),
    Row("mistral", "MistralForCausalLM", absent=MISTRAL),
    Row("qwen2", "Qwen2ForCausalLM", absent=QWEN, implied={"qkv_bias": True, "out_bias": False}),
    Row(
        "qwen3",
        "Qwen3ForCausalLM",
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
    rope_base: float = hf("rope_theta", "rope_parameters.rope_theta", default=10000.0)
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
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(f"d_model {self.d_model} does not divide into {self.num_heads} heads")
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ConfigError(
                f"layer_types names {len(self.layer_types)} layers of {self.num_layers}"
            )
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


class Llama(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`, after the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.rotary = make_rotary(
            config.width, config.rope_base, config.rope_scaling, config.max_seq_len
        )
        self.layers = nn.ModuleList(self.make_block(layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def make_block(self, layer: int) -> TransformerBlock:
        """One layer."""
        config = self.config
        attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=_qk_norm(config),
            dropout=config.dropout,
        )
        norm = partial(RMSNorm, config.d_model, config.norm_eps)
        return TransformerBlock(attention, self.make_ffn(layer), norm)

    def make_ffn(self, layer: int) -> nn.Module:
        """One layer's feed-forward."""
        config = self.config
        return GatedFeedForward(config.d_model, config.d_ff, config.activation, config.ffn_bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(input_ids)
        placed = place(
            input_ids, attention_mask, position_ids, caches,
            self.config.windows, self.rotary, x.dtype,
        )  # fmt: skip
        for layer, mask, position, cache in zip(
            self.layers, placed.masks, placed.positions, placed.caches, strict=True
        ):
            x = layer(x, mask, position, placed.at, cache)
        if caches is not None:
            caches.end()
        return self.norm(x)

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """Empty caches for `batch_size` rows: static of `max_len` positions, or growing."""
        config = self.config
        return make_caches(
            batch_size, max_len, config.windows, config.kv_heads, config.width,
            self.embedding.weight,
        )  # fmt: skip


def _qk_norm(config: LlamaConfig) -> Callable[[int, int], nn.Module] | None:
    if config.qk_norm == "head":
        return lambda heads, head_dim: RMSNorm(head_dim, config.norm_eps)
    if config.qk_norm == "width":
        return lambda heads, head_dim: RMSNorm((heads, head_dim), config.norm_eps)
    return None


PREFIX = "model."

ATTENTION: Rules = (
    Rule("model.embed_tokens.weight", "embedding.weight"),
    Rule("model.norm.weight", "norm.weight"),
    Rule("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Rule("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
    *(
        Rule(
            f"model.layers.{{i}}.self_attn.{theirs}.{kind}", f"layers.{{i}}.attention.{ours}.{kind}"
        )
        for theirs, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "out"))
        for kind in ("weight", "bias")
    ),
    *(
        Rule(
            f"model.layers.{{i}}.self_attn.{name}.weight",
            f"layers.{{i}}.attention.{name}.weight",
            reshape=True,
        )
        for name in ("q_norm", "k_norm")
    ),
    Dropped("model.layers.{i}.self_attn.rotary_emb.inv_freq"),
    Dropped("model.rotary_emb.inv_freq"),
)

FEEDFORWARD: Rules = tuple(
    Rule(f"model.layers.{{i}}.mlp.{name}_proj.{kind}", f"layers.{{i}}.ffn.{name}.{kind}")
    for name in ("gate", "up", "down")
    for kind in ("weight", "bias")
)


def head_rules(config: LlamaConfig) -> Rules:
    """Where the language head's weight stands."""
    if config.tie_embeddings:
        return (Tied("lm_head.weight", "model.embed_tokens.weight"),)
    return (Rule("lm_head.weight", "head.weight"),)


def rules(config: LlamaConfig) -> Rules:
    """The checkpoint map."""
    return (*ATTENTION, *FEEDFORWARD, *head_rules(config))
