"""DeBERTa: content and distance apart, positions only at the end (He et al. 2021, 2023).

Version 1 stores queries, keys and values as one; versions 2 and 3 put distances into buckets, share
the projections, and may set a convolution beside the first layer.
"""

from functools import partial

import torch
from torch import Tensor, nn

from polyhead.models.backbone import place
from polyhead.models.deberta_config import POSITIONS, PREFIX, DebertaConfig
from polyhead.models.heads import both
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.nn.disentangled import Disentangled, DisentangledAttention
from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.feedforward import FeedForward, activation_named
from polyhead.nn.mask import Lowered, Mask, as_mask
from polyhead.nn.norm import LayerNorm
from polyhead.nn.position import LearnedPositions, Position


class DebertaBlock(nn.Module):
    """Attention and feed-forward, each followed by the norm of its sum with its input."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        norm = partial(LayerNorm, config.d_model, config.norm_eps)
        self.attention = DisentangledAttention(
            config.d_model,
            config.num_heads,
            head_dim=config.head_dim,
            terms=config.terms if config.relative else (),
            shares=config.shares,
            key_bias=config.splits,
            # One term more than distances add, whether or not there are distances.
            scale=(config.width * (1 + len(config.terms))) ** -0.5,
            dropout=config.attention_dropout,
        )
        self.attention_norm = norm()
        self.ffn = FeedForward(config.d_model, config.d_ff, config.activation)
        self.ffn_norm = norm()
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Lowered,
        position: Position | None,
        at: Tensor,
        memory: Tensor | None = None,
    ) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`. memory: keys and values come from it; x only asks."""
        attended = self.attention(x, memory, mask, position, at)
        x = self.attention_norm(x + self.dropout(attended))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Convolution(nn.Module):
    """What neighbouring tokens add to the first layer (DeBERTa v2's n-grams)."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        width, size = config.d_model, config.conv_width
        self.conv = nn.Conv1d(width, width, size, padding=size // 2, groups=config.conv_groups)
        self.activation = activation_named(config.conv_activation)
        self.norm = LayerNorm(width, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, out: Tensor, keep: Tensor | None) -> Tensor:
        """x: the embedded tokens; out: the first layer's answer to them; keep: false on padding."""
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0.0)
        near = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(out + self.activation(self.dropout(near)))


class Deberta(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.table_width
        norm = partial(LayerNorm, config.d_model, config.norm_eps)
        self.embedding = TokenEmbedding(config.vocab_size, width)
        has_positions = config.biased_input or config.decoder == "enhanced"
        self.positions = LearnedPositions(config.max_seq_len, width) if has_positions else None
        types = config.type_vocab_size
        self.token_types = Table(types, width) if types else None
        is_narrow = config.embedding_width not in (None, config.d_model)
        self.widen = nn.Linear(width, config.d_model, bias=False) if is_narrow else None
        self.embedding_norm = norm()
        self.dropout = Dropout(config.dropout)
        self.relative = (
            Disentangled(
                config.d_model,
                config.buckets or config.max_distance,
                config.buckets,
                config.max_distance,
                norm() if config.norm_table else None,
                config.dropout,
            )
            if config.relative
            else None
        )
        self.conv = Convolution(config) if config.conv_width else None
        self.layers = nn.ModuleList(DebertaBlock(config) for _ in range(config.num_layers))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """token_type_ids `[B, T]`: zeros where none. position_ids: rows of the position table."""
        x, mask, relative, at = self.below(input_ids, attention_mask, token_type_ids, position_ids)
        return self.layers[-1](x, mask, relative, at)

    def decode_masked(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What an enhanced masked-LM head reads, `[B, T, E]`; the arguments are those of forward.

        Positions come in after the layers but one. The last layer runs twice: the states below
        stay its keys and values, and what it answers asks again.
        """
        x, mask, relative, at = self.below(input_ids, attention_mask, token_type_ids, position_ids)
        assert self.positions is not None
        asking = x + self.positions(at)
        for _ in range(2):
            asking = self.layers[-1](asking, mask, relative, at, memory=x)
        return asking

    def below(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Lowered, Position | None, Tensor]:
        """What the last layer is called with: all layers below it have run."""
        given = as_mask(attention_mask, input_ids.shape)
        if self.conv is not None and given.segments is not None:
            raise ValueError("the convolution mixes texts packed into one row; pad them instead")
        windows = [None] * len(self.layers)
        x = self.embedding(input_ids)
        placed = place(
            input_ids, given, position_ids, None, windows, self.relative, x.dtype, base=Mask()
        )
        if self.positions is not None and self.config.biased_input:
            x = x + self.positions(placed.at)
        if self.token_types is not None:
            kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_types(kinds)
        if self.widen is not None:
            x = self.widen(x)
        x = embedded = self.dropout(self.embedding_norm(x))
        mask, relative = placed.masks[0], placed.positions[0]
        for number, layer in enumerate(self.layers[:-1]):
            x = layer(x, mask, relative, placed.at)
            if number == 0 and self.conv is not None:
                x = self.conv(embedded, x, given.keep)
        return x, mask, relative, placed.at


def rules(config: DebertaConfig) -> Rules:
    """The checkpoint map of the backbone."""
    layer, ours = PREFIX + "encoder.layer.{i}.", "layers.{i}."
    top, encoder = PREFIX + "embeddings.", PREFIX + "encoder."
    parts = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "ffn.up",
        "output.dense": "ffn.down",
        "output.LayerNorm": "ffn_norm",
    }
    if config.splits:
        parts |= {
            "attention.self.query_proj": "attention.q",
            "attention.self.key_proj": "attention.k",
            "attention.self.value_proj": "attention.v",
            "attention.self.pos_key_proj": "attention.distance_k",
            "attention.self.pos_query_proj": "attention.distance_q",
        }
    has_positions = config.biased_input or config.decoder == "enhanced"
    return (
        Rule(top + "word_embeddings.weight", "embedding.weight"),
        Rule(POSITIONS, "positions.weight") if has_positions else Dropped(POSITIONS),
        Rule(top + "token_type_embeddings.weight", "token_types.weight"),
        Rule(top + "embed_proj.weight", "widen.weight"),
        *both(top + "LayerNorm", "embedding_norm"),
        Dropped(top + "position_ids"),
        Rule(encoder + "rel_embeddings.weight", "relative.table.weight"),
        *both(encoder + "LayerNorm", "relative.norm"),
        *both(encoder + "conv.conv", "conv.conv"),
        *both(encoder + "conv.LayerNorm", "conv.norm"),
        *(() if config.splits else _joined(config, layer + "attention.self.", ours + "attention.")),
        *(rule for name, own in parts.items() for rule in both(layer + name, ours + own)),
    )


def _joined(config: DebertaConfig, theirs: str, ours: str) -> Rules:
    """Version 1's: the queries, keys and values of one head after those of another."""
    joined = tuple(f"{ours}{part}.weight" for part in "qkv")
    return (
        Rule(theirs + "in_proj.weight", joined, heads=config.num_heads),
        Rule(theirs + "q_bias", ours + "q.bias"),
        Rule(theirs + "v_bias", ours + "v.bias"),
        Rule(theirs + "pos_proj.weight", ours + "distance_k.weight"),
        *both(theirs + "pos_q_proj", ours + "distance_q"),
    )
