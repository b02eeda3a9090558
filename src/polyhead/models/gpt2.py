"""GPT-2: pre-norm LayerNorm, learned positions, tanh-GELU (Radford et al. 2019)."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from polyhead.models.activations import read_activation, write_activation
from polyhead.models.backbone import make_caches, place
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.heads import language, last_token_classifier, token_classifier
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.cache import Caches
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import FeedForward
from polyhead.nn.mask import Mask
from polyhead.nn.norm import LayerNorm
from polyhead.nn.position import LearnedPositions

ROWS = (
    Row(
        "gpt2",
        "GPT2",
        "transformer.",
        {
            "lm": language("LMHeadModel", "transformer.wte.weight"),
            "classify": last_token_classifier(),
            "tag": token_classifier(),
        },
        harmless=frozenset(
            """n_ctx summary_activation summary_first_dropout summary_proj_to_labels summary_type
            summary_use_proj reorder_and_upcast_attn""".split()
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """Sizes and options of GPT-2. d_ff: None is 4 d_model. head_dim: None is an equal share."""

    vocab_size: int = hf("vocab_size", default=50257)
    d_model: int = hf("n_embd", default=768)
    d_ff: int | None = hf("n_inner", default=None)
    num_layers: int = hf("n_layer", default=12)
    num_heads: int = hf("n_head", default=12)
    head_dim: int | None = hf("head_dim", default=None)
    max_seq_len: int = hf("n_positions", default=1024)
    norm_eps: float = hf("layer_norm_epsilon", default=1e-5)
    activation: str = hf(
        "activation_function", default="gelu_tanh", read=read_activation, write=write_activation
    )
    tie_embeddings: bool = hf("tie_word_embeddings", default=True)
    scale_scores: bool = hf("scale_attn_weights", default=True)
    scale_by_layer: bool = hf("scale_attn_by_inverse_layer_idx", default=False)
    dropout: float = hf("resid_pdrop", default=0.0)
    attention_dropout: float = hf("attn_pdrop", default=0.0)
    embedding_dropout: float = hf("embd_pdrop", default=0.0)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        head_width(self.d_model, self.num_heads, self.head_dim)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def width(self) -> int:
        """The width of a head."""
        return head_width(self.d_model, self.num_heads, self.head_dim)

    def score_scale(self, layer: int) -> float:
        """The factor on a layer's scores."""
        scale = self.width**-0.5 if self.scale_scores else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


class GPT2(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`, after the final norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.positions = LearnedPositions(config.max_seq_len, config.d_model)
        self.dropout = Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(self.make_block(layer) for layer in range(config.num_layers))
        self.norm = LayerNorm(config.d_model, config.norm_eps)

    def make_block(self, layer: int) -> TransformerBlock:
        """One layer."""
        config = self.config
        attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            head_dim=config.head_dim,
            scale=config.score_scale(layer),
            dropout=config.attention_dropout,
        )
        ffn = FeedForward(config.d_model, config.d_ff or 4 * config.d_model, config.activation)
        norm = partial(LayerNorm, config.d_model, config.norm_eps)
        return TransformerBlock(attention, ffn, norm, dropout=config.dropout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(input_ids)
        windows = [None] * len(self.layers)
        placed = place(input_ids, attention_mask, position_ids, caches, windows, None, x.dtype)
        x = self.dropout(x + self.positions(placed.at))
        for layer, mask, cache in zip(self.layers, placed.masks, placed.caches, strict=True):
            x = layer(x, mask, None, placed.at, cache)
        if caches is not None:
            caches.end()
        return self.norm(x)

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """Empty caches for `batch_size` rows: static of `max_len` positions, or growing."""
        config = self.config
        windows = [None] * config.num_layers
        return make_caches(
            batch_size, max_len, windows, config.num_heads, config.width, next(self.parameters())
        )


def rules(config: GPT2Config) -> Rules:
    """The checkpoint map. Their Conv1D stores `[in, out]`."""
    layer, ours = "transformer.h.{i}.", "layers.{i}."
    qkv = tuple(f"{ours}attention.{part}." for part in "qkv")
    linear = (
        ("attn.c_proj", "attention.out"), ("mlp.c_fc", "ffn.up"), ("mlp.c_proj", "ffn.down"),
    )  # fmt: skip
    norms = (("ln_1", "attention_norm"), ("ln_2", "ffn_norm"))
    weight = Rule(
        f"{layer}attn.c_attn.weight", tuple(part + "weight" for part in qkv), transpose=True
    )
    return (
        Rule("transformer.wte.weight", "embedding.weight"),
        Rule("transformer.wpe.weight", "positions.weight"),
        weight,
        Rule(f"{layer}attn.c_attn.bias", tuple(part + "bias" for part in qkv)),
        *(Rule(f"{layer}{t}.weight", f"{ours}{o}.weight", transpose=True) for t, o in linear),
        *(Rule(f"{layer}{t}.bias", f"{ours}{o}.bias") for t, o in linear),
        *(Rule(f"{layer}{t}.{k}", f"{ours}{o}.{k}") for t, o in norms for k in ("weight", "bias")),
        *(Rule(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")),
        Dropped(f"{layer}attn.bias"),
        Dropped(f"{layer}attn.masked_bias"),
    )
