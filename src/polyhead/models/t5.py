"""T5: text to text, with relative buckets and scores that are not scaled (Raffel et al. 2020).

Version 1.0 has ReLU and one embedding for both ends, whose logits are scaled; version 1.1 and Flan
have a gated GELU and a head of their own (Shazeer 2020, Chung et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.backbone import CAUSAL, place
from polyhead.models.config import Config, Row, hf
from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.heads import HeadKind, language
from polyhead.models.keys import Dropped, Rule, Rules, Tied
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.cache import Caches
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.head import LanguageHead
from polyhead.nn.mask import EVERYTHING, Lowered, Mask
from polyhead.nn.norm import RMSNorm
from polyhead.nn.position import T5Bias

ENCODER = "T5EncoderModel"
PARTS = (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))


def make_head(config: "T5Config") -> LanguageHead:
    """Logits, scaled down in version 1.0, whose embedding is drawn with std 1."""
    if config.kind == "encoder":
        raise ConfigError("T5's encoder alone predicts no tokens; build it with head='none'")
    scale = config.d_model**-0.5 if config.scale_outputs else 1.0
    return LanguageHead(config.d_model, config.vocab_size, scale=scale)


HEADS = {
    "lm": HeadKind(
        "ForConditionalGeneration", make_head, language(embedding="shared.weight").rules
    ),
    "none": HeadKind("EncoderModel", lambda config: nn.Identity()),
}
ROWS = (
    Row(
        "t5",
        "T5",
        heads=HEADS,
        harmless=frozenset("n_positions output_past gradient_checkpointing".split()),
    ),
)


@dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """Sizes and options of T5.

    num_layers: of the encoder; num_decoder_layers: None is as many. feed_forward: an activation,
    or "gated-" and one. activation, gated: None is what feed_forward says. scale_outputs: None is
    as tie_embeddings. kind: "encoder-decoder", or "encoder" alone.
    """

    vocab_size: int = hf("vocab_size", default=32128)
    d_model: int = hf("d_model", default=512)
    head_dim: int = hf("d_kv", default=64)
    d_ff: int = hf("d_ff", default=2048)
    num_layers: int = hf("num_layers", default=6)
    num_decoder_layers: int | None = hf("num_decoder_layers", default=None)
    num_heads: int = hf("num_heads", default=8)
    num_buckets: int = hf("relative_attention_num_buckets", default=32)
    max_distance: int = hf("relative_attention_max_distance", default=128)
    norm_eps: float = hf("layer_norm_epsilon", default=1e-6)
    feed_forward: str = hf("feed_forward_proj", default="relu")
    activation: str | None = hf(
        "dense_act_fn", default=None, read=read_activation, write=write_activation
    )
    gated: bool | None = hf("is_gated_act", default=None)
    tie_embeddings: bool = hf("tie_word_embeddings", default=True)
    scale_outputs: bool | None = hf("scale_decoder_outputs", default=None)
    dropout: float = hf("dropout_rate", default=0.0)
    init_factor: float = hf("initializer_factor", default=1.0)
    kind: str = hf(
        "architectures",
        default="encoder-decoder",
        read=lambda named: "encoder" if named == [ENCODER] else "encoder-decoder",
        write=lambda kind: [ENCODER if kind == "encoder" else "T5ForConditionalGeneration"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        first, _, last = self.feed_forward.partition("-")
        if last and first != "gated":
            raise ConfigError(f"feed_forward is {self.feed_forward!r}; use relu or gated-gelu")
        # The one name that means another function than it says.
        said = "gelu_new" if self.feed_forward == "gated-gelu" else last or first
        # A head that turns out to be trained apart must not change the scale.
        implied = {
            "activation": read_activation(said),
            "gated": bool(last),
            "scale_outputs": self.tie_embeddings,
            "num_decoder_layers": self.num_layers,
        }
        for name, value in implied.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 2:
            raise ConfigError(
                f"{self.num_buckets} buckets over distances up to {self.max_distance} cannot be; "
                "use 4 buckets or more, and a max_distance above half of them"
            )
        if self.kind not in ("encoder-decoder", "encoder"):
            raise ConfigError(f"kind is {self.kind!r}; choose encoder-decoder or encoder")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS


class T5Stack(nn.Module):
    """The encoder or the decoder: embedded tokens to `[B, T, E]`, after the final norm."""

    def __init__(self, config: T5Config, num_layers: int, is_decoder: bool) -> None:
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.windows: list[int | None] = [None] * num_layers
        # Every layer reads the table; files keep it in the first.
        self.relative = T5Bias(
            config.num_heads, config.num_buckets, config.max_distance, bidirectional=not is_decoder
        )
        self.layers = nn.ModuleList(self.make_block() for _ in range(num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def make_block(self) -> TransformerBlock:
        """One layer. Its scores are not scaled: the weights of the queries begin smaller."""
        config = self.config
        attention = partial(
            MultiHeadAttention,
            config.d_model,
            config.num_heads,
            head_dim=config.head_dim,
            bias=False,
            scale=1.0,
            dropout=config.dropout,
        )
        make_ffn = GatedFeedForward if config.gated else FeedForward
        return TransformerBlock(
            attention(),
            make_ffn(config.d_model, config.d_ff, config.activation or "relu", bias=False),
            partial(RMSNorm, config.d_model, config.norm_eps),
            cross=attention() if self.is_decoder else None,
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
        x = self.dropout(embedded)
        placed = place(
            input_ids, attention_mask, position_ids, caches, self.windows, self.relative, x.dtype,
            base=CAUSAL if self.is_decoder else Mask(),
        )  # fmt: skip
        cross = caches.cross if caches is not None else [None] * len(self.layers)
        for number, layer in enumerate(self.layers):
            x = layer(
                x, placed.masks[number], placed.positions[number], placed.at,
                placed.caches[number], memory, memory_mask, cross[number],
            )  # fmt: skip
        if caches is not None:
            caches.end()
        return self.dropout(self.norm(x))


class T5(EncoderDecoder):
    """Source and target ids to the target's hidden states `[B, T, E]`, or an encoder's."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, config.num_layers, is_decoder=False)
        last = config.num_decoder_layers or config.num_layers
        both = config.kind == "encoder-decoder"
        self.decoder = T5Stack(config, last, is_decoder=True) if both else None

    def initialize(self) -> None:
        """T5's own start: where scores are not scaled, the queries' weights are."""
        config = self.config
        fan_in = config.init_factor * config.d_model**-0.5
        nn.init.normal_(self.embedding.weight, std=config.init_factor)
        for part in self.modules():
            if isinstance(part, MultiHeadAttention):
                nn.init.normal_(part.q.weight, std=fan_in * config.head_dim**-0.5)
                nn.init.normal_(part.k.weight, std=fan_in)
                nn.init.normal_(part.v.weight, std=fan_in)
                width = config.num_heads * config.head_dim
                nn.init.normal_(part.out.weight, std=config.init_factor * width**-0.5)
            elif isinstance(part, FeedForward | GatedFeedForward):
                nn.init.normal_(part.up.weight, std=fan_in)
                if isinstance(part, GatedFeedForward):
                    nn.init.normal_(part.gate.weight, std=fan_in)
                nn.init.normal_(part.down.weight, std=config.init_factor * config.d_ff**-0.5)
            elif isinstance(part, T5Bias):
                nn.init.normal_(part.table.weight, std=fan_in)


def rules(config: T5Config) -> Rules:
    """The checkpoint map."""
    found: list[Rule | Dropped | Tied] = [Rule("shared.weight", "embedding.weight")]
    found += _stack_rules("encoder", (("0.SelfAttention", "attention"),), config)
    if config.kind == "encoder-decoder":
        both = (("0.SelfAttention", "attention"), ("1.EncDecAttention", "cross"))
        found += _stack_rules("decoder", both, config)
    # Early files hold a table of the cross-attention that nothing reads.
    return (
        *found,
        Dropped("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    )


def _stack_rules(stack: str, attentions: Sequence[tuple[str, str]], config: T5Config) -> Rules:
    ffn = len(attentions)
    up = (("wi_0", "gate"), ("wi_1", "up")) if config.gated else (("wi", "up"),)
    pairs = [(f"{ffn}.DenseReluDense.{t}", f"ffn.{o}") for t, o in (*up, ("wo", "down"))]
    for number, (theirs, ours) in enumerate(attentions):
        pairs += [(f"{theirs}.{t}", f"{ours}.{o}") for t, o in PARTS]
        pairs.append((f"{number}.layer_norm", f"{ours}_norm"))
    pairs.append((f"{ffn}.layer_norm", "ffn_norm"))
    layer, ours = stack + ".block.{i}.layer.", stack + ".layers.{i}."
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *(Rule(f"{layer}{t}.weight", f"{ours}{o}.weight") for t, o in pairs),
        Rule(table, f"{stack}.relative.table.weight"),
        Rule(f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight"),
        Tied(f"{stack}.embed_tokens.weight", "shared.weight"),
    )
