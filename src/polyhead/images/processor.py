"""Pixel values as a checkpoint expects them, from images of any kind."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.images import settings
from polyhead.images.opening import check_size, open_image
from polyhead.images.pillow import pillow
from polyhead.images.sizes import Exactly, Size, read_size

MAX_PIXELS = 50_000_000
SQUARE = Exactly(224, 224)


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Resize, crop at the centre, scale and norm: what a `preprocessor_config.json` says.

    size:       None leaves images as they are. resample: Pillow's number (0 nearest, 1 Lanczos,
                2 bilinear, 3 bicubic, 4 box, 5 Hamming).
    crop:       None does not crop; what is smaller is filled up with black first.
    scale:      times the bytes, None: 1. mean, std: one for each channel, as many as the model
                takes; `norms` says whether they are applied.
    to_rgb:     lay transparency of images in memory on white; files lose it.
    pads:       fill up to a square with the mean, before resizing (LLaVA).
    max_pixels: larger images are refused, by their header.
    """

    size: Size | None = SQUARE
    resample: int = 2
    crop: Exactly | None = None
    scale: float | None = 1 / 255
    mean: tuple[float, ...] = settings.STANDARD[0]
    std: tuple[float, ...] = settings.STANDARD[1]
    norms: bool = True
    to_rgb: bool = False
    pads: bool = False
    max_pixels: int = MAX_PIXELS
    stem: str = "ViT"
    source: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean) or 0 in self.std:
            raise ConfigError(
                f"image_mean {self.mean} and image_std {self.std} must name 1 or 3 channels, and "
                "no std of 0"
            )
        if self.resample not in range(6):
            raise ConfigError(f"resample is {self.resample!r}; it must be from 0 to 5")

    @classmethod
    def load(cls, directory: str | Path, max_pixels: int = MAX_PIXELS) -> "Processor":
        """The processor of a model's directory; raises FileError or ConfigError."""
        stem, said = settings.read(Path(directory))
        crop = read_size(said["crop_size"], True, "crop_size") if said["do_center_crop"] else None
        if crop is not None and not isinstance(crop, Exactly):
            raise ConfigError(f"crop_size is {said['crop_size']!r}; it needs height and width")
        if said["do_pad"] and stem != "Llava":
            raise ConfigError("do_pad is true; Polyhead pads only as LlavaImageProcessor does")
        is_square = said["default_to_square"]
        return cls(
            size=read_size(said["size"], is_square, "size") if said["do_resize"] else None,
            resample=said["resample"],
            crop=crop,
            scale=_number(said["rescale_factor"]) if said["do_rescale"] else None,
            mean=_channels(said["image_mean"]),
            std=_channels(said["image_std"]),
            norms=said["do_normalize"],
            to_rgb=said["do_convert_rgb"],
            pads=said["do_pad"],
            max_pixels=max_pixels,
            stem=stem,
            source={key: said[key] for key in said.keys() & settings.HARMLESS},
        )

    def save(self, directory: str | Path) -> None:
        """Write `preprocessor_config.json`, which transformers reads as well."""
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder} is a file; name a directory to save to")
        folder.mkdir(parents=True, exist_ok=True)
        said = {
            **self.source,
            "image_processor_type": f"{self.stem}ImageProcessor",
            "do_resize": self.size is not None,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.scale is not None,
            "do_normalize": self.norms,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.to_rgb,
        }
        if self.size is not None:
            said["size"] = self.size.to_hf()
        if self.crop is not None:
            said["crop_size"] = self.crop.to_hf()
        if self.scale is not None:
            said["rescale_factor"] = self.scale
        if self.stem == "Llava":
            said["do_pad"] = self.pads
        said.pop("feature_extractor_type", None)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __call__(self, images: Any) -> Tensor:
        """Pixel values `[B, C, height, width]`, fp32, of one image or a sequence of them.

        An image is a path, the bytes of a file, a Pillow image or an array `[H, W, C]` of whole
        numbers from 0 to 255. Raises DataError for what is no image, is broken or too large.
        """
        many = list(images) if _are_several(images) else [images]
        if not many:
            raise DataError("there are no images; pass one or more")
        made = [self.pixels(image, _name(image, i)) for i, image in enumerate(many)]
        shapes = sorted({f"{image.shape[1]} x {image.shape[2]}" for image in made})
        if len(shapes) > 1:
            raise DataError(
                f"the images come out as {', '.join(shapes)} and make no batch: pass them one by "
                "one, or use a processor that crops"
            )
        return torch.from_numpy(np.stack(made))

    def pixels(self, image: Any, name: str = "the image") -> "np.ndarray[Any, Any]":
        """One image's values `[C, height, width]`."""
        picture = open_image(image, self.max_pixels, self.to_rgb, name)
        mode = "L" if len(self.mean) == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        if self.pads:
            picture = self._square(picture)
        if self.size is not None:
            height, width = self.size.of(picture.height, picture.width)
            check_size(width, height, self.max_pixels, f"{name}, resized,")
            picture = picture.resize((width, height), self.resample)
        if self.crop is not None:
            picture = _centre(picture, self.crop)
        values = np.asarray(picture).reshape(picture.height, picture.width, -1)
        # A byte has 256 values: each is scaled and normed once.
        return np.stack([row[values[..., i]] for i, row in enumerate(self._table())])

    def _table(self) -> "np.ndarray[Any, Any]":
        """What each byte becomes in each channel, `[C, 256]` fp32."""
        scale = 1.0 if self.scale is None else self.scale
        table = np.tile((np.arange(256.0) * scale).astype(np.float32), (len(self.mean), 1))
        if self.norms:
            mean, std = (np.array(value, np.float32) for value in (self.mean, self.std))
            table = (table - mean[:, None]) / std[:, None]
        return table

    def _square(self, picture: Any) -> Any:
        edge = max(picture.size)
        color = tuple(int(value * 255) for value in self.mean)
        square = pillow().Image.new(picture.mode, (edge, edge), color)
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        return square


def _centre(picture: Any, crop: Exactly) -> Any:
    """The middle of a picture; what lies outside of it is black."""
    left, top = (picture.width - crop.width) // 2, (picture.height - crop.height) // 2
    return picture.crop((left, top, left + crop.width, top + crop.height))


def _are_several(images: Any) -> bool:
    one = str | Path | bytes | bytearray | memoryview | np.ndarray
    return isinstance(images, Sequence) and not isinstance(images, one)


def _name(image: Any, number: int) -> str:
    return str(image) if isinstance(image, str | Path) else f"image {number + 1}"


def _channels(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else (value,) * 3
    return tuple(_number(one) for one in values)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"preprocessor_config.json holds {value!r} where a number must stand")
    return float(value)
