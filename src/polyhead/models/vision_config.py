"""What the configurations of image models share."""

from dataclasses import dataclass
from typing import Any, ClassVar

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import Config, hf
from polyhead.nn.patches import Grid

Size = int | tuple[int, ...]
"""A square's edge, or height and width."""


def read_size(value: Any) -> Any:
    """A size as `config.json` has it."""
    return tuple(value) if isinstance(value, list) else value


def write_size(value: Any) -> Any:
    """A size for `config.json`."""
    return list(value) if isinstance(value, tuple) else value


def pair(name: str, size: Size) -> Grid:
    """Height and width of a size; raises ConfigError where it is none."""
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or not all(1 <= edge <= 2**14 for edge in both):
        raise ConfigError(
            f"{name} is {size}; it must be an edge, or height and width, from 1 to {2**14}"
        )
    return both[0], both[1]


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """Sizes and options of an image model."""

    kind: ClassVar[str] = "vision"

    image_size: int | tuple[int, ...] = hf(
        "image_size", default=224, read=read_size, write=write_size
    )
    patch_size: int | tuple[int, ...] = hf(
        "patch_size", default=16, read=read_size, write=write_size
    )
    num_channels: int = hf("num_channels", default=3)
    qkv_bias: bool = hf("qkv_bias", default=True)
    activation: str = hf("hidden_act", default="gelu", read=read_activation, write=write_activation)
    dropout: float = hf("hidden_dropout_prob", default=0.0)
    attention_dropout: float = hf("attention_probs_dropout_prob", default=0.0)
    init_std: float = hf("initializer_range", default=0.02)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_channels <= 2**12:
            raise ConfigError(f"num_channels is {self.num_channels}; it must be from 1 to {2**12}")
        if min(self.grid) < 1:
            raise ConfigError(
                f"image_size {self.image_size} does not hold one patch of {self.patch_size}"
            )

    @property
    def patch(self) -> Grid:
        """Height and width of a patch."""
        return pair("patch_size", self.patch_size)

    @property
    def grid(self) -> Grid:
        """Rows and columns of whole patches in an image of the trained size."""
        height, width = pair("image_size", self.image_size)
        return height // self.patch[0], width // self.patch[1]
