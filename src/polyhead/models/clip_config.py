"""CLIP's configurations: of each tower, which also stands alone, and of the two together."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Config, Row, head_width, hf
from polyhead.models.heads import HeadKind
from polyhead.models.keys import Rule
from polyhead.models.nested import made_part, read_part, write_part
from polyhead.nn.clip_head import ClassTokenNorm, ImageProjection, Similarity, TextProjection

# Old files hold, for each tower, all that a config of transformers could say.
UNREAD = frozenset({"dropout", "gradient_checkpointing", "tie_word_embeddings", "vocab_size"})

TEXT_ROW = Row(
    "clip_text_model",
    "CLIPText",
    "text_model.",
    {
        "project": HeadKind(
            "ModelWithProjection",
            lambda config: TextProjection(config.d_model, config.projection_dim),
            lambda config: (Rule("text_projection.weight", "projection.weight"),),
        )
    },
    harmless=UNREAD,
)
VISION_ROW = Row(
    "clip_vision_model",
    "CLIPVision",
    "vision_model.",
    {
        "project": HeadKind(
            "ModelWithProjection",
            lambda config: ImageProjection(config.d_model, config.projection_dim),
            lambda config: (Rule("visual_projection.weight", "projection.weight"),),
        )
    },
    pooler=lambda config: ClassTokenNorm(config.d_model, config.norm_eps),
    harmless=UNREAD,
)
ROW = Row(
    "clip",
    "CLIP",
    heads={
        "contrastive": HeadKind(
            "Model",
            lambda config: Similarity(config.logit_scale_init),
            lambda config: (Rule("logit_scale", "log_scale"),),
        )
    },
)


def check_size(name: str, size: int, most: int = 2**24) -> None:
    """Raise ConfigError for a size out of bounds."""
    if not 1 <= size <= most:
        raise ConfigError(f"{name} is {size}; it must be from 1 to {most}")


@dataclass(frozen=True, kw_only=True)
class CLIPTowerConfig(Config):
    """What both towers have.

    projection_dim: of the tower with its projection, standing alone. head_dim: None is an equal
    share of d_model.
    """

    d_model: int = hf("hidden_size", default=512)
    d_ff: int = hf("intermediate_size", default=2048)
    num_layers: int = hf("num_hidden_layers", default=12)
    num_heads: int = hf("num_attention_heads", default=8)
    head_dim: int | None = hf("head_dim", default=None)
    norm_eps: float = hf("layer_norm_eps", default=1e-5)
    activation: str = hf(
        "hidden_act", default="quick_gelu", read=read_activation, write=write_activation
    )
    projection_dim: int = hf("projection_dim", default=512)
    dropout: float = hf("attention_dropout", default=0.0)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        head_width(self.d_model, self.num_heads, self.head_dim)
        check_size("projection_dim", self.projection_dim)


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(CLIPTowerConfig):
    """Sizes and options of the text tower.

    eos_token_id: the text's vector is at its first; 2, as old files wrongly say, means the
    highest id.
    """

    kind: ClassVar[str] = "encoder"
    vocab_size: int = hf("vocab_size", default=49408)
    max_seq_len: int = hf("max_position_embeddings", default=77)
    eos_token_id: int = hf("eos_token_id", default=49407)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return (TEXT_ROW,)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(CLIPTowerConfig):
    """Sizes and options of the image tower; images are square."""

    kind: ClassVar[str] = "vision"
    d_model: int = hf("hidden_size", default=768)
    d_ff: int = hf("intermediate_size", default=3072)
    num_heads: int = hf("num_attention_heads", default=12)
    image_size: int = hf("image_size", default=224)
    patch_size: int = hf("patch_size", default=32)
    num_channels: int = hf("num_channels", default=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("num_channels", self.num_channels, 2**12)
        check_size("image_size", self.image_size, 2**14)
        check_size("patch_size", self.patch_size, self.image_size)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return (VISION_ROW,)

    @property
    def num_patches(self) -> int:
        """Patches of an image; what is left at the edges belongs to none."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(Config):
    """Two towers, the width of the space they share, and the temperature's logarithm at first.

    text, vision: a tower's config, or its fields.
    """

    kind: ClassVar[str] = "two towers"
    text: CLIPTextConfig = hf(  # noqa: RUF009
        "text_config_dict",
        "text_config",
        default=CLIPTextConfig(model_type="clip_text_model"),
        fresh="text_config",
        read=partial(read_part, CLIPTextConfig, "clip_text_model"),
        write=write_part,
    )
    vision: CLIPVisionConfig = hf(  # noqa: RUF009
        "vision_config_dict",
        "vision_config",
        default=CLIPVisionConfig(model_type="clip_vision_model"),
        fresh="vision_config",
        read=partial(read_part, CLIPVisionConfig, "clip_vision_model"),
        write=write_part,
    )
    projection_dim: int = hf("projection_dim", default=512)
    logit_scale_init: float = hf("logit_scale_init_value", default=2.6592)

    def __post_init__(self) -> None:
        text = made_part(CLIPTextConfig, "clip_text_model", self.text)
        vision = made_part(CLIPVisionConfig, "clip_vision_model", self.vision)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "vision", vision)
        super().__post_init__()
        check_size("projection_dim", self.projection_dim)

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return (ROW,)

    @property
    def vocab_size(self) -> int:
        """The text tower's."""
        return self.text.vocab_size

    @property
    def max_seq_len(self) -> int:
        """The text tower's."""
        return self.text.max_seq_len

    @property
    def num_layers(self) -> int:
        """The deeper tower's."""
        return max(self.text.num_layers, self.vision.num_layers)
