"""The choices of a transformer that you build yourself, and the part behind each word."""

from dataclasses import dataclass

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.heads import language, last_token_classifier, token_classifier
from polyhead.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from polyhead.nn.mask import Mask
from polyhead.nn.moe import MixtureOfExperts
from polyhead.nn.norm import NORMS
from polyhead.nn.patterns import big_bird, strided
from polyhead.nn.position import (
    Alibi,
    LearnedPositions,
    MarianPositions,
    Position,
    SinusoidalPositions,
    T5Bias,
)
from polyhead.nn.rotary import Rotary

HEADS = {
    "lm": language("LMHeadModel", "transformer.embedding.weight", "head.weight"),
    "classify": last_token_classifier(),
    "tag": token_classifier(),
}
ROWS = (Row("transformer", "Transformer", "transformer.", HEADS),)
CHOICES = {
    "kind": ("encoder-decoder", "decoder", "encoder"),
    "position": ("sinusoidal", "marian", "learned", "rotary", "alibi", "t5", "shaw", "none"),
    "norm": tuple(NORMS),
    "activation": tuple(ACTIVATIONS),
    "pattern": ("none", "strided", "big_bird"),
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Sizes and choices; `CHOICES` lists what the words may be.

    num_layers: of each stack. window: keys a query sees. pattern: strided by `stride`, or
    big_bird with `window`, `num_global` and `num_random`. num_experts: 0 for none.
    max_distance: of Shaw's and T5's tables. slopes: ALiBi's, one a head; None are the paper's.
    head_dim: None is an equal share of d_model. attention_dropout: None is as dropout.
    """

    vocab_size: int = hf("vocab_size")
    d_model: int = hf("d_model", default=512)
    d_ff: int = hf("d_ff", default=2048)
    num_layers: int = hf("num_layers", default=6)
    num_heads: int = hf("num_heads", default=8)
    num_kv_heads: int | None = hf("num_kv_heads", default=None)
    head_dim: int | None = hf("head_dim", default=None)
    max_seq_len: int = hf("max_seq_len", default=1024)
    kind: str = hf("kind", default="encoder-decoder")
    position: str = hf("position", default="sinusoidal")
    norm: str = hf("norm", default="layer")
    norm_first: bool = hf("norm_first", default=False)
    norm_eps: float = hf("norm_eps", default=1e-5)
    activation: str = hf("activation", default="relu")
    gated: bool = hf("gated", default=False)
    bias: bool = hf("bias", default=True)
    window: int | None = hf("window", default=None)
    pattern: str = hf("pattern", default="none")
    stride: int = hf("stride", default=16)
    num_global: int = hf("num_global", default=1)
    num_random: int = hf("num_random", default=2)
    max_distance: int = hf("max_distance", default=128)
    slopes: tuple[float, ...] | None = hf(
        "alibi_slopes", default=None, read=lambda value: value and tuple(value), write=list
    )
    rope_base: float = hf("rope_base", default=10000.0)
    num_experts: int = hf("num_experts", default=0)
    top_k: int = hf("top_k", default=2)
    capacity_factor: float | None = hf("capacity_factor", default=None)
    shared_d_ff: int | None = hf("shared_d_ff", default=None)
    scale_embeddings: bool = hf("scale_embeddings", default=True)
    tie_embeddings: bool = hf("tie_embeddings", default=True)
    dropout: float = hf("dropout", default=0.0)
    attention_dropout: float | None = hf("attention_dropout", default=None)
    init_std: float = hf("init_std", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}"
                )
        head_width(self.d_model, self.num_heads, self.head_dim)
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.slopes is not None and len(self.slopes) != self.num_heads:
            raise ConfigError(
                f"slopes has {len(self.slopes)} for {self.num_heads} heads; name one each"
            )
        if self.position == "t5" and self.max_distance <= 16:
            raise ConfigError(f"max_distance is {self.max_distance}; T5's buckets need 17 or more")
        if self.pattern == "big_bird" and self.window is None:
            raise ConfigError("pattern big_bird needs a window; the paper's is three blocks")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def width(self) -> int:
        """The width of a head."""
        return head_width(self.d_model, self.num_heads, self.head_dim)

    @property
    def windows(self) -> list[int | None]:
        """Each layer's window; BigBird's is part of its pattern."""
        return [None if self.pattern == "big_bird" else self.window] * self.num_layers


def absolute_position(config: TransformerConfig) -> nn.Module | None:
    """What is added to the embeddings, if anything."""
    if config.position == "sinusoidal":
        return SinusoidalPositions(config.d_model)
    if config.position == "marian":
        return MarianPositions(config.d_model)
    if config.position == "learned":
        return LearnedPositions(config.max_seq_len, config.d_model)
    return None


def relative_position(config: TransformerConfig, is_causal: bool) -> Position | None:
    """What turns or biases the scores, where one serves all layers."""
    if config.position == "rotary":
        return Rotary(config.width, config.rope_base)
    if config.position == "alibi":
        return Alibi(config.num_heads, config.slopes)
    if config.position == "t5":
        return T5Bias(config.num_heads, 32, config.max_distance, bidirectional=not is_causal)
    return None


def feedforward(config: TransformerConfig) -> nn.Module:
    """A layer's feed-forward: plain, gated, or experts."""
    if config.num_experts:
        return MixtureOfExperts(
            config.d_model,
            config.d_ff,
            config.num_experts,
            config.top_k,
            activation=config.activation,
            capacity_factor=config.capacity_factor,
            shared_d_ff=config.shared_d_ff,
        )
    kind = GatedFeedForward if config.gated else FeedForward
    return kind(config.d_model, config.d_ff, config.activation, config.bias)


def sparse_pattern(config: TransformerConfig) -> Mask:
    """The sparse mask of every layer."""
    if config.pattern == "strided":
        return strided(config.stride)
    if config.pattern == "big_bird":
        assert config.window is not None
        return big_bird(config.window, config.num_global, config.num_random, config.max_seq_len)
    return Mask()
