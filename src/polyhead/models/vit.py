"""ViT: an image is a text of patches (Dosovitskiy et al. 2021).

DeiT adds a distillation token (Touvron et al. 2021a); DINOv2 adds a learned scale to each branch,
a gated feed-forward in its giant, and takes images of any size (Oquab et al. 2023).
"""

from functools import partial

import torch
from torch import Tensor, nn

from polyhead.models.heads import both
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.models.vit_config import DINOv2Config, ViTConfig
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import TransformerBlock
from polyhead.nn.dropout import Dropout
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.norm import LayerNorm
from polyhead.nn.patches import PatchEmbedding, PatchPositions
from polyhead.nn.residual import DropPath, LayerScale


class ScaledBlock(TransformerBlock):
    """Pre-norm, with a learned scale on each branch."""

    def __init__(
        self,
        attention: MultiHeadAttention,
        ffn: nn.Module,
        norm: partial[LayerNorm],
        config: DINOv2Config,
    ) -> None:
        super().__init__(attention, ffn, norm)
        self.attention_scale = LayerScale(config.d_model, config.layer_scale)
        self.ffn_scale = LayerScale(config.d_model, config.layer_scale)
        self.drop_path = DropPath(config.path_dropout)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[B, T, E]` to `[B, T, E]`."""
        x = x + self.drop_path(self.attention_scale(self.attention(self.attention_norm(x))))
        return x + self.drop_path(self.ffn_scale(self.ffn(self.ffn_norm(x))))


class ViT(nn.Module):
    """Images `[B, C, height, width]` to hidden states `[B, T, E]`, after the final norm.

    The first token is the class token; in DeiT the second is the distillation token.
    """

    def __init__(self, config: ViTConfig | DINOv2Config) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config.num_channels, config.d_model, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        if config.is_distilled:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        if config.has_mask_token:
            # Of its masked pre-training; no forward here reads it.
            self.mask_token = nn.Parameter(torch.zeros(1, config.d_model))
        self.positions = PatchPositions(
            config.d_model, config.grid, 1 + config.is_distilled, config.any_size
        )
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(make_block(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.d_model, config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embed(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What the first layer sees, `[B, T, E]`."""
        grid = self.patches.grid(pixel_values)
        extra = [self.class_token, *([self.distillation_token] if self.config.is_distilled else [])]
        rows = [token.expand(len(pixel_values), -1, -1) for token in extra]
        x = torch.cat([*rows, self.patches(pixel_values)], dim=1)
        return self.dropout(x + self.positions(grid))


def make_block(config: ViTConfig | DINOv2Config) -> TransformerBlock:
    """One layer."""
    attention = MultiHeadAttention(
        config.d_model,
        config.num_heads,
        head_dim=config.head_dim,
        bias=config.qkv_bias,
        out_bias=True,
        dropout=config.attention_dropout,
    )
    norm = partial(LayerNorm, config.d_model, config.norm_eps)
    if isinstance(config, ViTConfig):
        ffn = FeedForward(config.d_model, config.d_ff, config.activation)
        return TransformerBlock(attention, ffn, norm, dropout=config.dropout)
    if config.is_gated:
        ffn = GatedFeedForward(config.d_model, config.d_ff, "silu", bias=True)
    else:
        ffn = FeedForward(config.d_model, config.d_ff, config.activation)
    return ScaledBlock(attention, ffn, norm, config)


ATTENTION_PARTS = {
    "attention.attention.query": "attention.q",
    "attention.attention.key": "attention.k",
    "attention.attention.value": "attention.v",
    "attention.output.dense": "attention.out",
}
VIT_PARTS = {
    "layernorm_before": "attention_norm",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
    "layernorm_after": "ffn_norm",
}
DINOV2_PARTS = {
    "norm1": "attention_norm",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
    "norm2": "ffn_norm",
}
GATED_PARTS = {
    "norm1": "attention_norm",
    "mlp.weights_in": "ffn.gate ffn.up",
    "mlp.weights_out": "ffn.down",
    "norm2": "ffn_norm",
}


def rules(config: ViTConfig | DINOv2Config) -> Rules:
    """The checkpoint map. SwiGLU's gate and up are one layer there."""
    prefix = config.row(config.model_type).prefix
    layer, ours = f"{prefix}encoder.layer.{{i}}.", "layers.{i}."
    if isinstance(config, ViTConfig):
        parts = ATTENTION_PARTS | VIT_PARTS
    else:
        parts = ATTENTION_PARTS | (GATED_PARTS if config.is_gated else DINOV2_PARTS)
    embeddings = f"{prefix}embeddings."
    mask = f"{embeddings}mask_token"
    return (
        *(
            Rule(f"{layer}{there}.{kind}", tuple(f"{ours}{name}.{kind}" for name in here.split()))
            for there, here in parts.items()
            for kind in ("weight", "bias")
        ),
        Rule(f"{layer}layer_scale1.lambda1", f"{ours}attention_scale.weight"),
        Rule(f"{layer}layer_scale2.lambda1", f"{ours}ffn_scale.weight"),
        *both(f"{embeddings}patch_embeddings.projection", "patches.projection"),
        Rule(f"{embeddings}cls_token", "class_token"),
        Rule(f"{embeddings}distillation_token", "distillation_token"),
        Rule(mask, "mask_token") if config.has_mask_token else Dropped(mask),
        Rule(f"{embeddings}position_embeddings", "positions.table"),
        *both(f"{prefix}layernorm", "norm"),
        *both(f"{prefix}pooler.dense", "pooler.dense"),
    )
