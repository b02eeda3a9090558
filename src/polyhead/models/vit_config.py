"""Sizes, options and heads of ViT, DeiT and DINOv2."""

from dataclasses import dataclass
from typing import ClassVar

from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Row, head_width, hf
from polyhead.models.heads import HeadKind, both
from polyhead.models.vision_config import VisionConfig, read_size, write_size
from polyhead.nn.image_head import (
    ClassAndMeanClassifier,
    ClassTokenClassifier,
    DistilledClassifier,
    ImagePooler,
)


def class_token_head() -> HeadKind:
    """A linear layer on the class token."""
    return HeadKind(
        "ForImageClassification",
        lambda config: ClassTokenClassifier(config.d_model, config.num_labels),
        lambda config: both("classifier", "classifier"),
    )


def distilled_head() -> HeadKind:
    """DeiT's two classifiers, of which the second learned from a teacher."""
    return HeadKind(
        "ForImageClassificationWithTeacher",
        lambda config: DistilledClassifier(config.d_model, config.num_labels),
        lambda config: (
            *both("cls_classifier", "classifier"),
            *both("distillation_classifier", "distilled"),
        ),
    )


def class_and_mean_head() -> HeadKind:
    """DINOv2's linear layer."""
    return HeadKind(
        "ForImageClassification",
        lambda config: ClassAndMeanClassifier(config.d_model, config.num_labels),
        lambda config: both("classifier", "classifier"),
    )


def make_pooler(config: "ViTConfig") -> ImagePooler:
    """ViT's and DeiT's pooler."""
    width = config.pooler_width or config.d_model
    return ImagePooler(config.d_model, width, config.pooler_activation)


UNREAD = frozenset(
    """encoder_stride out_features out_indices stage_names apply_layernorm
    reshape_hidden_states""".split()
)

VIT_ROWS = (
    Row(
        "vit",
        "ViT",
        "vit.",
        {"classify": class_token_head()},
        make_pooler,
        implied={"is_distilled": False},
        harmless=UNREAD,
    ),
    Row(
        "deit",
        "DeiT",
        "deit.",
        {"classify": class_token_head(), "distilled": distilled_head()},
        make_pooler,
        implied={"is_distilled": True},
        harmless=UNREAD,
    ),
)

DINO_ROWS = (
    Row("dinov2", "Dinov2", "dinov2.", {"classify": class_and_mean_head()}, harmless=UNREAD),
)


def read_pooler_activation(name: str) -> str:
    """A pooler's activation; tanh is used nowhere else."""
    return name if name == "tanh" else read_activation(name)


def write_pooler_activation(name: str) -> str:
    """A pooler's activation by Hugging Face's name."""
    return name if name == "tanh" else write_activation(name)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(VisionConfig):
    """What ViT and DINOv2 share. head_dim: None is an equal share of d_model."""

    d_model: int = hf("hidden_size", default=768)
    num_layers: int = hf("num_hidden_layers", default=12)
    num_heads: int = hf("num_attention_heads", default=12)
    head_dim: int | None = hf("head_dim", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        head_width(self.d_model, self.num_heads, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """Sizes and options of ViT and DeiT. pooler_width: None is d_model."""

    d_ff: int = hf("intermediate_size", default=3072)
    norm_eps: float = hf("layer_norm_eps", default=1e-12)
    pooler_width: int | None = hf("pooler_output_size", default=None)
    pooler_activation: str = hf(
        "pooler_act", default="tanh", read=read_pooler_activation, write=write_pooler_activation
    )
    is_distilled: bool = False
    has_mask_token: ClassVar[bool] = False
    any_size: ClassVar[bool] = False

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return VIT_ROWS


@dataclass(frozen=True, kw_only=True)
class DINOv2Config(EncoderConfig):
    """Sizes and options of DINOv2. is_gated: SwiGLU of two thirds of the width."""

    patch_size: int | tuple[int, ...] = hf(
        "patch_size", default=14, read=read_size, write=write_size
    )
    norm_eps: float = hf("layer_norm_eps", default=1e-6)
    mlp_ratio: float = hf("mlp_ratio", default=4)
    is_gated: bool = hf("use_swiglu_ffn", default=False)
    layer_scale: float = hf("layerscale_value", default=1.0)
    path_dropout: float = hf("drop_path_rate", default=0.0)
    has_mask_token: bool = hf("use_mask_token", default=True)
    is_distilled: ClassVar[bool] = False
    any_size: ClassVar[bool] = True

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return DINO_ROWS

    @property
    def d_ff(self) -> int:
        """The feed-forward's width."""
        width = int(self.d_model * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.is_gated else width
