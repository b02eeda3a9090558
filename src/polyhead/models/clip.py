"""CLIP: a text tower and an image tower, trained to agree (Radford et al. 2021).

Both are pre-norm transformers. The text's attention is causal, and its vector stands at the
end-of-text token; the image's at the class token.
"""

from functools import partial

import torch
from torch import Tensor, nn

from polyhead.models.backbone import place
from polyhead.models.clip_config import (
    VISION_ROW,
    CLIPConfig,
    CLIPTextConfig,
    CLIPTowerConfig,
    CLIPVisionConfig,
)
from polyhead.models.heads import both, within
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.feedforward import FeedForward
from polyhead.nn.mask import Mask, as_mask
from polyhead.nn.norm import LayerNorm
from polyhead.nn.patches import PatchEmbedding
from polyhead.nn.position import LearnedPositions

# What ids of the vocabulary never are.
NO_ID = -1
# What files older than the right id say; the end of a text had the highest id.
WRONG_EOS = 2


class CLIPText(nn.Module):
    """Token ids `[B, T]` to hidden states `[B, T, E]`, after the final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model)
        self.positions = LearnedPositions(config.max_seq_len, config.d_model)
        self.layers = make_layers(config)
        self.norm = LayerNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | Mask | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.embedding(input_ids)
        windows = [None] * len(self.layers)
        placed = place(input_ids, attention_mask, position_ids, None, windows, None, x.dtype)
        x = x + self.positions(placed.at)
        for layer, mask in zip(self.layers, placed.masks, strict=True):
            x = layer(x, mask, None, placed.at)
        return self.norm(x)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor | Mask | None = None) -> Tensor:
        """The states `[B, E]` at each text's first end-of-text token, or, as transformers does,
        at its first token where there is none."""
        hidden = self(input_ids, attention_mask)
        keep = as_mask(attention_mask, input_ids.shape).keep
        ids = input_ids if keep is None else input_ids.masked_fill(~keep, NO_ID)
        eos = self.config.eos_token_id
        at = ids.argmax(-1) if eos == WRONG_EOS else (ids == eos).int().argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at]


class CLIPVision(nn.Module):
    """Images `[B, C, height, width]` to hidden states `[B, 1 + patches, E]`, without a final norm.

    The class token comes first.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = (config.patch_size, config.patch_size)
        self.patches = PatchEmbedding(config.num_channels, config.d_model, patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(config.d_model))
        self.positions = Table(1 + config.num_patches, config.d_model)
        self.embedding_norm = LayerNorm(config.d_model, config.norm_eps)
        self.layers = make_layers(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embed(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return x

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What the first layer sees, `[B, 1 + patches, E]`."""
        height, width = self.patches.grid(pixel_values)
        side = self.config.image_size // self.config.patch_size
        if (height, width) != (side, side):
            raise ValueError(
                f"the images have {height} x {width} patches and this model takes {side} x {side}: "
                f"resize them to {self.config.image_size} x {self.config.image_size}"
            )
        x = self.patches(pixel_values)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        return self.embedding_norm(x + self.positions.weight)


class CLIP(nn.Module):
    """Token ids `[texts, T]` and images `[images, C, height, width]` to cosines `[texts, images]`.

    The head scales them.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        text, vision = config.text, config.vision
        assert VISION_ROW.pooler is not None
        self.text = CLIPText(text)
        self.vision = CLIPVision(vision)
        self.vision_pooler = VISION_ROW.pooler(vision)
        self.text_projection = nn.Linear(text.d_model, config.projection_dim, bias=False)
        self.image_projection = nn.Linear(vision.d_model, config.projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | Mask | None = None,
    ) -> Tensor:
        texts = self.encode_text(input_ids, attention_mask)
        images = self.encode_image(pixel_values)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        images = images / images.norm(dim=-1, keepdim=True)
        return texts @ images.T

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | Mask | None = None) -> Tensor:
        """Each text's vector in the shared space, `[texts, P]`, before it is normalised."""
        return self.text_projection(self.text.pooled(input_ids, attention_mask))

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Each image's vector in the shared space, `[images, P]`, before it is normalised."""
        return self.image_projection(self.vision_pooler(self.vision(pixel_values)))


def make_layers(config: CLIPTowerConfig) -> nn.ModuleList:
    """The blocks of a tower."""

    def block() -> TransformerBlock:
        attention = MultiHeadAttention(
            config.d_model, config.num_heads, head_dim=config.head_dim, dropout=config.dropout
        )
        ffn = FeedForward(config.d_model, config.d_ff, config.activation)
        return TransformerBlock(attention, ffn, partial(LayerNorm, config.d_model, config.norm_eps))

    return nn.ModuleList(block() for _ in range(config.num_layers))


LAYERS: Rules = tuple(
    rule
    for theirs, ours in (
        ("layer_norm1", "attention_norm"), ("layer_norm2", "ffn_norm"),
        ("self_attn.q_proj", "attention.q"), ("self_attn.k_proj", "attention.k"),
        ("self_attn.v_proj", "attention.v"), ("self_attn.out_proj", "attention.out"),
        ("mlp.fc1", "ffn.up"), ("mlp.fc2", "ffn.down"),
    )
    for rule in both(f"encoder.layers.{{i}}.{theirs}", f"layers.{{i}}.{ours}")
)  # fmt: skip

TEXT: Rules = (
    Rule("embeddings.token_embedding.weight", "embedding.weight"),
    Rule("embeddings.position_embedding.weight", "positions.weight"),
    *LAYERS,
    *both("final_layer_norm", "norm"),
    Dropped("embeddings.position_ids"),
)

VISION: Rules = (
    Rule("embeddings.patch_embedding.weight", "patches.projection.weight"),
    Rule("embeddings.class_embedding", "class_token"),
    Rule("embeddings.position_embedding.weight", "positions.weight"),
    # The misspelling is theirs.
    *both("pre_layrnorm", "embedding_norm"),
    *LAYERS,
    Dropped("embeddings.position_ids"),
)

VISION_POOLER = both("post_layernorm", "norm")


def text_rules(config: CLIPTextConfig) -> Rules:
    """The checkpoint map of the text tower alone."""
    return within("", TEXT, "text_model.")


def vision_rules(config: CLIPVisionConfig) -> Rules:
    """The checkpoint map of the image tower alone."""
    return (
        *within("", VISION, "vision_model."),
        *within("pooler.", VISION_POOLER, "vision_model."),
    )


def rules(config: CLIPConfig) -> Rules:
    """The checkpoint map."""
    return (
        *within("text.", TEXT, "text_model."),
        *within("vision.", VISION, "vision_model."),
        *within("vision_pooler.", VISION_POOLER, "vision_model."),
        Rule("text_projection.weight", "text_projection.weight"),
        Rule("visual_projection.weight", "image_projection.weight"),
    )
