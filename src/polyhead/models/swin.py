"""Swin: attention within windows that shift from layer to layer (Liu et al. 2021)."""

from dataclasses import dataclass

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.config import Row, hf
from polyhead.models.heads import HeadKind, both
from polyhead.models.keys import Dropped, Rule, Rules
from polyhead.models.vision_config import VisionConfig, read_size, write_size
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.dropout import Dropout
from polyhead.nn.feedforward import FeedForward
from polyhead.nn.image_head import MeanClassifier
from polyhead.nn.norm import LayerNorm
from polyhead.nn.patches import Grid, PatchEmbedding, PatchPositions
from polyhead.nn.residual import DropPath
from polyhead.nn.windows import PatchMerging, WindowBias, Windows

ROWS = (
    Row(
        "swin",
        "Swin",
        "swin.",
        {
            "classify": HeadKind(
                "ForImageClassification",
                lambda config: MeanClassifier(config.width(-1), config.num_labels),
                lambda config: both("classifier", "classifier"),
            )
        },
        harmless=frozenset(
            """hidden_size num_layers encoder_stride out_features out_indices stage_names
            path_norm""".split()
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SwinConfig(VisionConfig):
    """Sizes and options of Swin.

    d_model: of the first stage; each further one doubles it. head_dim: of each stage; None is an
    equal share of its channels.
    """

    patch_size: int | tuple[int, ...] = hf(
        "patch_size", default=4, read=read_size, write=write_size
    )
    d_model: int = hf("embed_dim", default=96)
    depths: tuple[int, ...] = hf("depths", default=(2, 2, 6, 2), read=read_size, write=write_size)
    num_heads: tuple[int, ...] = hf(
        "num_heads", default=(3, 6, 12, 24), read=read_size, write=write_size
    )
    head_dim: tuple[int, ...] | None = hf(
        "head_dim", default=None, read=read_size, write=write_size
    )
    window: int = hf("window_size", default=7)
    mlp_ratio: float = hf("mlp_ratio", default=4.0)
    norm_eps: float = hf("layer_norm_eps", default=1e-5)
    path_dropout: float = hf("drop_path_rate", default=0.1)
    has_positions: bool = hf("use_absolute_embeddings", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is not None and len(self.head_dim) != len(self.num_heads):
            raise ConfigError(f"head_dim is {self.head_dim}; name the width of each stage's heads")
        if len(self.depths) != len(self.num_heads) or min((*self.depths, 0)) < 0:
            raise ConfigError(
                f"depths {self.depths} and num_heads {self.num_heads} must name the layers and the "
                "heads of each stage"
            )
        for stage, heads in enumerate(self.num_heads):
            if heads < 1 or (self.head_dim is None and self.width(stage) % heads):
                raise ConfigError(
                    f"the {self.width(stage)} channels of stage {stage} do not divide into {heads} "
                    "heads"
                )

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    @property
    def num_layers(self) -> int:
        """Of all stages."""
        return sum(self.depths)

    def width(self, stage: int) -> int:
        """Channels of a stage; -1 is the last."""
        return self.d_model * 2 ** (stage % len(self.depths))


class SwinBlock(nn.Module):
    """Pre-norm; attention sees each window alone."""

    def __init__(self, config: SwinConfig, stage: int, path_dropout: float) -> None:
        super().__init__()
        width = config.width(stage)
        self.attention_norm = LayerNorm(width, config.norm_eps)
        self.attention = MultiHeadAttention(
            width,
            config.num_heads[stage],
            head_dim=config.head_dim[stage] if config.head_dim else None,
            bias=config.qkv_bias,
            out_bias=True,
            dropout=config.attention_dropout,
        )
        self.bias = WindowBias(config.num_heads[stage], config.window)
        self.ffn_norm = LayerNorm(width, config.norm_eps)
        self.ffn = FeedForward(width, int(config.mlp_ratio * width), config.activation)
        self.dropout = Dropout(config.dropout)
        self.drop_path = DropPath(path_dropout)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """`[B, h * w, E]` to `[B, h * w, E]`."""
        seen = windows.cut(self.attention_norm(x))
        found = windows.join(self.attention(seen, position=self.bias.within(windows)))
        x = x + self.drop_path(self.dropout(found))
        return x + self.drop_path(self.dropout(self.ffn(self.ffn_norm(x))))


class SwinStage(nn.Module):
    """Layers over one grid, every second one with shifted windows; then a grid of half the size."""

    def __init__(self, config: SwinConfig, stage: int) -> None:
        super().__init__()
        self.edge = config.window
        before = sum(config.depths[:stage])
        last = max(config.num_layers - 1, 1)
        self.layers = nn.ModuleList(
            SwinBlock(config, stage, config.path_dropout * (before + layer) / last)
            for layer in range(config.depths[stage])
        )
        is_last = stage == len(config.depths) - 1
        self.merge = None if is_last else PatchMerging(config.width(stage))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # A grid no larger than a window is one that does not shift.
        is_small = min(grid) <= self.edge
        edge, shift = (min(grid), 0) if is_small else (self.edge, self.edge // 2)
        straight = Windows.of(x, grid, edge, 0)
        shifted = Windows.of(x, grid, edge, shift) if shift else straight
        for layer, block in enumerate(self.layers):
            x = block(x, shifted if layer % 2 else straight)
        return x if self.merge is None else self.merge(x, grid)


class Swin(nn.Module):
    """Images `[B, C, height, width]` to hidden states `[B, T, E]` of the last stage, normed."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config.num_channels, config.d_model, config.patch, pads=True)
        self.embedding_norm = LayerNorm(config.d_model)
        if config.has_positions:
            self.positions = PatchPositions(config.d_model, config.grid)
        self.dropout = Dropout(config.dropout)
        self.stages = nn.ModuleList(SwinStage(config, stage) for stage in range(len(config.depths)))
        self.norm = LayerNorm(config.width(-1), config.norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        grid = self.patches.grid(pixel_values)
        x = self.embedding_norm(self.patches(pixel_values))
        if self.config.has_positions:
            x = x + self.positions(grid)
        x = self.dropout(x)
        for stage in self.stages:
            x = stage(x, grid)
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        return self.norm(x)


PARTS = {
    "layernorm_before": "attention_norm",
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.out",
    "layernorm_after": "ffn_norm",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
}


def rules(config: SwinConfig) -> Rules:
    """The checkpoint map. Older files hold an index that follows from the window."""
    stage, ours = "swin.encoder.layers.{s}.", "stages.{s}."
    block, layer = f"{stage}blocks.{{i}}.", f"{ours}layers.{{i}}."
    return (
        *(rule for there, here in PARTS.items() for rule in both(block + there, layer + here)),
        Rule(f"{block}attention.self.relative_position_bias_table", f"{layer}bias.table"),
        Dropped(f"{block}attention.self.relative_position_index"),
        Rule(f"{stage}downsample.reduction.weight", f"{ours}merge.reduction.weight"),
        *both(f"{stage}downsample.norm", f"{ours}merge.norm"),
        *both("swin.embeddings.patch_embeddings.projection", "patches.projection"),
        Rule("swin.embeddings.position_embeddings", "positions.table"),
        Dropped("swin.embeddings.mask_token"),
        *both("swin.embeddings.norm", "embedding_norm"),
        *both("swin.layernorm", "norm"),
    )
