"""Pixel values against transformers' processors, and what is no image."""

import json
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.images import Processor

SMALL = {"height": 20, "width": 20}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SMALL),
    "vit-wide": ViTImageProcessorPil(size={"height": 11, "width": 30}, resample=0),
    "vit-shortest": ViTImageProcessorPil(
        size={"shortest_edge": 18}, do_center_crop=True, crop_size=SMALL, resample=1
    ),
    "vit-no-norm": ViTImageProcessorPil(size=SMALL, do_normalize=False),
    "vit-no-rescale": ViTImageProcessorPil(size=SMALL, do_rescale=False, image_mean=[100, 1, 2.5]),
    "vit-no-resize": ViTImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=25),
    "vit-rgb": ViTImageProcessorPil(size=SMALL, do_convert_rgb=True),
    "vit-255": ViTImageProcessorPil(size=SMALL, rescale_factor=1 / 127.5),
    "deit": DeiTImageProcessorPil(size={"height": 24, "width": 24}, crop_size=SMALL),
    "dinov2": BitImageProcessorPil(
        size={"shortest_edge": 25},
        crop_size={"height": 21, "width": 17},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 22}, crop_size=SMALL),
    "clip-crop-larger": CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=21),
    "clip-no-crop": CLIPImageProcessorPil(size={"shortest_edge": 16}, do_center_crop=False),
    "llava": LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size=SMALL),
    "llava-pad": LlavaImageProcessorPil(size={"shortest_edge": 20}, crop_size=SMALL, do_pad=True),
    "box": CLIPImageProcessorPil(size=SMALL, do_center_crop=False, resample=4),
    "hamming": CLIPImageProcessorPil(size=SMALL, do_center_crop=False, resample=5),
}
SIZES = {"large": (61, 47), "tall": (9, 50), "wide": (40, 13), "tiny": (1, 2), "as-is": (20, 20)}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return made if channels > 1 else made[..., 0]


def ours(reference: Any, folder: Path) -> Processor:
    reference.save_pretrained(folder)
    return Processor.load(folder)


def theirs(reference: Any, image: Any) -> torch.Tensor:
    return reference(image, return_tensors="pt").pixel_values.float()


def check(reference: Any, image: Any, folder: Path) -> None:
    expected, found = theirs(reference, image), ours(reference, folder)(image)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_random_images_are_theirs(name: str, size: str, tmp_path: Path) -> None:
    check(PROCESSORS[name], Image.fromarray(noise(*SIZES[size])), tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["clip", "dinov2", "vit-rgb", "llava-pad"])
def test_arrays_are_theirs(name: str, channels: int, tmp_path: Path) -> None:
    array = noise(31, 26, channels).reshape(31, 26, channels)
    check(PROCESSORS[name], array, tmp_path)
    assert torch.equal(Processor.load(tmp_path)(array), Processor.load(tmp_path)(array.astype(int)))


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(noise(33, 27)).quantize(16)
    if transparent:
        image.info["transparency"] = 3
    return image


MODES = {
    "gray": lambda: Image.fromarray(noise(33, 27, 1)),
    "gray-alpha": lambda: Image.fromarray(noise(33, 27, 2), mode="LA"),
    "rgba": lambda: Image.fromarray(noise(33, 27, 4)),
    "palette": lambda: palette(False),
    "palette-transparent": lambda: palette(True),
    "bits": lambda: Image.fromarray(noise(33, 27, 1) > 99),
    "cmyk": lambda: Image.fromarray(noise(33, 27, 4), mode="CMYK"),
    "ycbcr": lambda: Image.fromarray(noise(33, 27), mode="YCbCr"),
    "16-bit": lambda: Image.fromarray(noise(33, 27, 1).astype(np.uint16) * 3),
    "32-bit": lambda: Image.fromarray(noise(33, 27, 1).astype(np.int32) * 2),
    "float": lambda: Image.fromarray(noise(33, 27, 1).astype(np.float32)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["clip", "vit-rgb"])
def test_modes_in_memory_are_theirs(name: str, mode: str, tmp_path: Path) -> None:
    check(PROCESSORS[name], MODES[mode](), tmp_path)


FILES = {
    "png": ("RGB", {}),
    "jpeg": ("RGB", {"quality": 80}),
    "webp": ("RGBA", {"lossless": True}),
    "gif": ("P", {}),
    "bmp": ("RGB", {}),
    "tiff": ("CMYK", {}),
    "ppm": ("L", {}),
}


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("name", ["clip", "vit", "llava-pad"])
def test_files_are_theirs(name: str, ending: str, tmp_path: Path) -> None:
    mode, options = FILES[ending]
    path = tmp_path / f"image.{ending}"
    Image.fromarray(noise(29, 35)).convert(mode).save(path, **options)
    expected = theirs(PROCESSORS[name], str(path))
    processor = ours(PROCESSORS[name], tmp_path / "model")
    for image in (path, str(path), path.read_bytes()):
        assert (processor(image) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(noise(12, 30)).save(path, exif=exif)
    reference = PROCESSORS["clip-no-crop"]
    expected = theirs(reference, str(path))
    assert torch.equal(ours(reference, tmp_path)(path), expected)
    with Image.open(path) as image:  # in memory it is taken as it stands
        assert ours(reference, tmp_path)(image).shape[2:] == (16, 40)


def test_a_batch_is_its_images(tmp_path: Path) -> None:
    processor = ours(PROCESSORS["clip"], tmp_path)
    images = [Image.fromarray(noise(30 + i, 50 - i, seed=i)) for i in range(3)]
    batch = processor(images)
    assert batch.shape == (3, 3, 20, 20)
    assert torch.equal(batch, torch.cat([processor(image) for image in images]))
    assert torch.equal(batch, processor(tuple(np.array(image) for image in images)))


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_saved_loads_there(name: str, tmp_path: Path) -> None:
    processor = ours(PROCESSORS[name], tmp_path / "theirs")
    processor.save(tmp_path / "ours")
    image = Image.fromarray(noise(25, 40))
    back = AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert type(back) is type(PROCESSORS[name])
    assert (theirs(back, image) - theirs(PROCESSORS[name], image)).abs().max() <= 1e-6
    assert Processor.load(tmp_path / "ours") == processor


OLD = {
    "vit": dict(
        do_normalize=True, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=26
    ),
    "deit": dict(
        crop_size=22,
        do_center_crop=True,
        feature_extractor_type="DeiTFeatureExtractor",
        resample=3,
        size=25,
    ),
    "clip": dict(
        crop_size=23, do_center_crop=True, feature_extractor_type="CLIPFeatureExtractor", size=23
    ),
    "swin": dict(feature_extractor_type="ViTFeatureExtractor", size=[18, 22]),
    "dinov2": dict(size={"shortest_edge": 27}, crop_size={"height": 14, "width": 14}),
    "llava": dict(processor_class="LlavaProcessor", size=30, crop_size=28),
}


@pytest.mark.parametrize("model_type", OLD)
def test_older_files_and_those_that_name_no_class(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OLD[model_type]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    image = Image.fromarray(noise(50, 41))
    reference = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert (Processor.load(tmp_path)(image) - theirs(reference, image)).abs().max() <= 1e-6


def test_settings_inside_a_processor_config(tmp_path: Path) -> None:
    nested = {"image_processor": PROCESSORS["clip"].to_dict(), "processor_class": "LlavaProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    image = noise(30, 30)
    expected = theirs(PROCESSORS["clip"], image)
    assert (Processor.load(tmp_path)(image) - expected).abs().max() <= 1e-6


def test_gray_models_take_gray_images() -> None:
    processor = Processor(size=None, mean=(0.5,), std=(0.5,))
    array = noise(8, 8, 1)
    expected = torch.from_numpy(array / 255).float() * 2 - 1
    for image in (array, array[..., None], Image.fromarray(array)):
        assert (processor(image)[0, 0] - expected).abs().max() <= 1e-6
    assert processor(noise(8, 8, 3)).shape == (1, 1, 8, 8)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header alone is true."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("edge", [7072, 12_000, 60_000])
@pytest.mark.filterwarnings("error")
def test_pixels_are_counted_before_decoding(edge: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(edge, edge))
    with pytest.raises(DataError, match="more"):
        Processor()(path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    array = noise(30, 30)
    assert Processor(max_pixels=900, size=None)(array).shape == (1, 3, 30, 30)
    for image in (array, Image.fromarray(array)):
        with pytest.raises(DataError, match="30 x 30 pixels, more than the 899"):
            Processor(max_pixels=899)(image)
    PROCESSORS["clip"].save_pretrained(tmp_path)
    with pytest.raises(DataError, match="899"):
        Processor.load(tmp_path, max_pixels=899)(array)


def test_resizing_makes_no_bomb_either(tmp_path: Path) -> None:
    processor = ours(PROCESSORS["clip"], tmp_path)
    with pytest.raises(DataError, match="resized"):
        processor(noise(1, 200_000))


def text_file(folder: Path) -> Path:
    path = folder / "letter.png"
    path.write_text("Dear Sir,\nthis is no image.")
    return path


def cut_file(folder: Path) -> Path:
    path = folder / "cut.jpg"
    Image.fromarray(noise(60, 60)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    return path


def program(folder: Path) -> Path:
    path = folder / "program.eps"
    Image.fromarray(noise(8, 8)).save(path)
    return path


WRONG = {
    "letter.png": text_file,
    "cut.jpg": cut_file,
    "program.eps": program,
    "nowhere.png": lambda folder: folder / "nowhere.png",
    "image 1 is no image": lambda folder: b"",
    "a dict": lambda folder: {"path": "x"},
    "[3, 8, 9]": lambda folder: np.zeros((3, 8, 9), np.uint8),
    "[8]": lambda folder: np.zeros(8, np.uint8),
    "[0, 8, 3]": lambda folder: np.zeros((0, 8, 3), np.uint8),
    "float32": lambda folder: np.full((8, 8, 3), 0.5, np.float32),
    "float64": lambda folder: np.full((8, 8, 3), np.nan),
    "uint16": lambda folder: np.full((8, 8), 300, np.uint16),
    "<U1": lambda folder: np.full((8, 8), "x"),
    "there are no images": lambda folder: [],
    "image 2": lambda folder: [noise(8, 8), b"GIF89a"],
}


@pytest.mark.parametrize("says", WRONG)
def test_what_is_no_image_is_refused_by_name(says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Processor()(WRONG[says](tmp_path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_make_no_batch() -> None:
    with pytest.raises(DataError, match="10 x 12, 8 x 8"):
        Processor(size=None)([noise(8, 8), noise(10, 12)])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (dict(image_processor_type="SamImageProcessor"), "SamImageProcessor"),
        (dict(do_flip_channel_order=True), "do_flip_channel_order"),
        (dict(size={"longest_edge": 20}), "longest_edge"),
        (dict(size=0), "0"),
        (dict(size={"height": 8, "width": 10**9}), str(10**9)),
        (dict(size="large"), "large"),
        (dict(crop_size={"shortest_edge": 20}), "crop_size"),
        (dict(resample="bicubic"), "bicubic"),
        (dict(resample=9), "9"),
        (dict(image_std=[0, 1, 1]), "image_std"),
        (dict(image_mean=[0.5, 0.5]), "image_mean"),
        (dict(image_mean=["a", "b", "c"]), "'a'"),
        (dict(rescale_factor="1/255"), "1/255"),
        (dict(do_pad=True), "do_pad"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict, says: str, tmp_path: Path) -> None:
    data = {**PROCESSORS["clip"].to_dict(), **changed}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        Processor.load(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_without_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no preprocessor_config"):
        Processor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(FileError, match="not JSON"):
        Processor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(PolyheadError, match="does not know"):
        Processor.load(tmp_path)


def test_pillow_is_imported_when_an_image_is_met() -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from polyhead.images import Processor\n"
        "try: Processor()(b'')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "ConfigError images need Pillow; pip install 'polyhead[images]'\n"


def test_buffers_and_memory_views_are_bytes(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.fromarray(noise(9, 9)).save(buffer, "PNG")
    data = buffer.getvalue()
    processor = Processor(size=None)
    assert torch.equal(processor(memoryview(data)), processor(bytearray(data)))
