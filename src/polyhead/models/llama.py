"""The LLaMA family: Llama 1 to 3.2, SmolLM2, Mistral, Qwen2 and Qwen3 as rows.

Pre-norm RMSNorm, rotary positions, SwiGLU, grouped key/value heads (Touvron et al. 2023).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from polyhead.models.backbone import make_caches, place
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.models.llama_config import LlamaConfig
from polyhead.models.rope import make_rotary
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.cache import Caches
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import GatedFeedForward
from polyhead.nn.mask import Mask
from polyhead.nn.norm import RMSNorm


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
        c, like = self.config, next(self.parameters())
        return make_caches(batch_size, max_len, c.windows, c.kv_heads, c.width, like)


def _qk_norm(config: LlamaConfig) -> Callable[[int, int], nn.Module] | None:
    if config.qk_norm == "head":
        return lambda heads, head_dim: RMSNorm(head_dim, config.norm_eps)
    if config.qk_norm == "width":
        return lambda heads, head_dim: RMSNorm((heads, head_dim), config.norm_eps)
    return None


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


def rules(config: LlamaConfig) -> Rules:
    """The checkpoint map."""
    return (*ATTENTION, *FEEDFORWARD)
