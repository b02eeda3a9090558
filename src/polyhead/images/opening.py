"""From a path, bytes, a Pillow image or an array to an image of the channels a model takes.

What comes from outside is measured by its header before anything is decoded. Modes are converted
as transformers converts them: a file is turned upright by its EXIF and loses its transparency; an
image in memory is taken as it stands and, where a processor says `do_convert_rgb`, laid on white.
"""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from polyhead.errors import DataError
from polyhead.images.pillow import pillow

# Others that Pillow reads run programs (EPS), or are no pictures.
FORMATS = "PNG JPEG GIF BMP DIB WEBP AVIF TIFF JPEG2000 PPM ICO TGA QOI PCX".split()


def open_image(image: Any, max_pixels: int, to_rgb: bool, name: str) -> Any:
    """A Pillow image of mode RGB or L from whatever a user passes.

    to_rgb: whether transparency is laid on white and gray becomes RGB. name: of the image in
    errors. Raises DataError for what is no image, is broken or has more than `max_pixels`.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels, to_rgb, name)
    if isinstance(image, str | Path | bytes | bytearray | memoryview):
        return _from_file(image, max_pixels, name)
    if isinstance(image, pillow().Image.Image):
        check_size(*image.size, max_pixels, name)
        return _decoded(lambda: _on_white(image) if to_rgb else _opaque(image), name)
    raise DataError(
        f"{name} is a {type(image).__name__}; pass a path, bytes, a Pillow image or an array of "
        "height, width and channels"
    )


def check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    """Raise DataError for more pixels than are allowed."""
    if width * height > max_pixels:
        raise DataError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels} allowed; make it "
            "smaller, or raise max_pixels if you trust it"
        )


def _from_file(source: Any, max_pixels: int, name: str) -> Any:
    library = pillow()
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise DataError(f"there is no image file {source}; name one that exists")
        opened = source
    else:
        opened = BytesIO(source)
    library.Image.init()
    known = [kind for kind in FORMATS if kind in library.Image.OPEN]
    # Pillow warns of sizes that are refused here anyway.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.Image.DecompressionBombWarning)
        image = _decoded(lambda: library.Image.open(opened, formats=known), name)
    with image:
        check_size(*image.size, max_pixels, name)
        return _decoded(lambda: library.ImageOps.exif_transpose(image).convert("RGB"), name)


def _decoded(make: Any, name: str) -> Any:
    """What `make` makes; whatever a decoder may raise becomes a DataError that names the image."""
    library = pillow()
    try:
        return make()
    except library.Image.DecompressionBombError:
        raise DataError(
            f"{name} has more pixels than Pillow opens ({2 * library.Image.MAX_IMAGE_PIXELS}); "
            "make it smaller"
        ) from None
    except library.UnidentifiedImageError:
        raise DataError(f"{name} is no image; pass a PNG, JPEG, WebP or the like") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise DataError(f"{name} is a broken image: {reason}; fetch it again") from None


def _on_white(image: Any) -> Any:
    """An image with its transparency laid on white."""
    library = pillow().Image
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = library.new("RGBA", image.size, (255, 255, 255, 255))
    return library.alpha_composite(white, image).convert("RGB")


def _opaque(image: Any) -> Any:
    """An image of mode L or RGB, its transparency left out."""
    return image.copy() if image.mode in ("L", "RGB") else image.convert("RGB")


def _from_array(array: Any, max_pixels: int, to_rgb: bool, name: str) -> Any:
    """An image from numbers `[height, width]` or `[height, width, 1 | 3 | 4]`."""
    shape = list(array.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise DataError(
            f"{name} is an array of shape {shape}; pass height, width and 1, 3 or 4 channels"
        )
    check_size(shape[1], shape[0], max_pixels, name)
    if array.dtype != np.uint8:
        array = _whole(array, name)
    array = array.reshape(*shape[:2], -1)
    if array.shape[2] == 4 and to_rgb:
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    return pillow().Image.fromarray(np.ascontiguousarray(array))


def _whole(array: Any, name: str) -> Any:
    """Numbers of another type as bytes, where they are whole and from 0 to 255."""
    is_number = np.issubdtype(array.dtype, np.number) or array.dtype == bool
    with np.errstate(invalid="ignore"):
        small = array.astype(np.uint8) if is_number else array
    if not is_number or not np.array_equal(small, array):
        raise DataError(
            f"{name} is an array of {array.dtype} that are not all whole numbers from 0 to 255; "
            "multiply fractions by 255 and round them"
        )
    return small
