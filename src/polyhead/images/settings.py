"""`preprocessor_config.json`: what each processor of Hugging Face's does unless told otherwise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, FileError

JSON = Mapping[str, Any]

STANDARD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

_ALL: JSON = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_center_crop": False,
    "do_convert_rgb": False,
    "do_pad": False,
    "crop_size": None,
}
_SHORTEST: JSON = {
    **_ALL,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": CLIP[0],
    "image_std": CLIP[1],
    "do_center_crop": True,
    "do_convert_rgb": True,
    "default_to_square": False,
}
_VIT: JSON = {
    **_ALL,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "image_mean": STANDARD[0],
    "image_std": STANDARD[1],
    "default_to_square": True,
}
DEFAULTS: Mapping[str, JSON] = {
    "ViT": _VIT,
    "DeiT": {
        **_VIT,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "do_center_crop": True,
    },
    "Bit": _SHORTEST,
    "CLIP": _SHORTEST,
    "Llava": _SHORTEST,
}
"""By the stem of the class; `ViTImageProcessor`, `ViTFeatureExtractor` and the like."""

OF_MODEL = {"vit": "ViT", "deit": "DeiT", "swin": "ViT", "dinov2": "Bit", "clip": "CLIP",
            "clip_vision_model": "CLIP", "llava": "Llava"}  # fmt: skip
"""The processor of a model whose file names none."""

HARMLESS = frozenset(
    """_processor_class auto_map data_format device disable_grouping feature_extractor_type
    image_processor_type image_seq_length input_data_format model_input_names num_channels
    processor_class return_tensors transformers_version use_fast""".split()
)


def read(directory: Path) -> tuple[str, dict[str, Any]]:
    """The processor's stem and every setting, from a model's directory.

    Raises FileError where there is no such file, ConfigError for one of another kind and for
    settings that nothing here reads.
    """
    data = _read_json(directory / "processor_config.json").get("image_processor")
    if not isinstance(data, dict):
        path = directory / "preprocessor_config.json"
        if not path.exists():
            raise FileError(f"{directory} has no preprocessor_config.json; it belongs to no images")
        data = _read_json(path)
    stem = _stem(data, directory)
    known = DEFAULTS[stem]
    for key, value in data.items():
        if key not in known and key not in HARMLESS and value is not None and value is not False:
            raise ConfigError(
                f"preprocessor_config.json has {key!r}: {value!r}, which Polyhead does not read and"
                " which may change the pixels; remove it if you know that it does not"
            )
    return stem, {**known, **{key: value for key, value in data.items() if value is not None}}


def _stem(data: JSON, directory: Path) -> str:
    named = data.get("image_processor_type") or data.get("feature_extractor_type")
    if named is None:
        model_type = _read_json(directory / "config.json").get("model_type")
        named = OF_MODEL.get(str(model_type), f"{model_type}'s processor")
    stem = str(named)
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        stem = stem.removesuffix(ending)
    if stem not in DEFAULTS:
        raise ConfigError(
            f"{directory} needs {named}, which Polyhead does not know; it knows "
            f"{', '.join(DEFAULTS)} processors"
        )
    return stem


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(data, dict):
        raise FileError(f"{path} holds a {type(data).__name__}, not an object; fetch it again")
    return data
