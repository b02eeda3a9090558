"""GGUF files as Hugging Face checkpoints: a config.json, and tensors under Hugging Face's names."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.files.gguf import GgufFile, open_gguf
from polyhead.files.gguf_types import RawTensor
from polyhead.files.gguf_write import write_gguf
from polyhead.models.config_json import complete_hf, from_hf
from polyhead.models.gguf_config import (
    config_from_metadata,
    family_of_config,
    family_of_metadata,
    metadata_from_config,
)
from polyhead.models.gguf_packed import Packed
from polyhead.models.gguf_tensors import ROPE_FREQS, GgufTensors, HfTensors
from polyhead.models.registry import family_of

# Of most weights, as llama.h's llama_ftype numbers it.
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7,
    "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
}  # fmt: skip
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read(path: str | Path, outlined: bool = False) -> tuple[dict[str, Any], HfTensors, GgufFile]:
    """A GGUF file as (config.json, tensors by Hugging Face's names, the file itself).

    outlined: of tensors in blocks the shapes alone, as `HfTensors` has it.
    Errors: FileError for a broken file, ConfigError for an architecture or a setting not read here.
    """
    file = open_gguf(path)
    shapes = {name: file.shape(name) for name in file.names}
    try:
        freqs = file.tensor(ROPE_FREQS) if ROPE_FREQS in file else None
        config = config_from_metadata(file.metadata, shapes, freqs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, HfTensors(file, family_of_metadata(file.metadata), config, outlined), file


def write(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Mapping[str, Any] | None = None,
    *,
    blocks: str | None = None,
    force: bool = False,
) -> None:
    """Write a Hugging Face checkpoint as GGUF: floats keep their type, but vectors become fp32.

    Tensors of another GGUF file, as `read` gives them, keep their blocks.
    blocks: "Q8_0", "Q4_0" or "Q4_1" packs the matrices so, tables of tokens and heads as Q8_0;
    what does not divide into blocks of 32 becomes fp16.
    tokenizer: metadata `tokenizer.*`, from `tokenizer_metadata` or another GGUF file; its token ids
    stand before the config's. Errors: ConfigError for what GGUF cannot say, FileError from writing.
    """
    family = family_of_config(config)
    # Every default spelled out, and one spelling of each thing.
    config = complete_hf(from_hf(family_of(config["model_type"]).config, config))
    metadata, freqs = metadata_from_config(config)
    names = GgufTensors(family, config, tensors, freqs)
    weights: Counter[str] = Counter()
    for name in names:
        tensor = names[name]
        kind = tensor.kind if isinstance(tensor, RawTensor) else FLOATS.get(tensor.dtype)
        if kind is None:
            raise FileError(f"{path}: {name} is not fp32, fp16 or bf16; convert it first")
        weights[kind] += math.prod(tensor.shape) if len(tensor.shape) > 1 else 0
    metadata["general.type"] = "model"
    most, _ = weights.most_common(1)[0]
    if (kind := blocks or most) in FILE_TYPES:
        metadata["general.file_type"] = FILE_TYPES[kind]
    metadata["general.quantization_version"] = 2
    for key, value in (tokenizer or {}).items():
        if key.startswith("tokenizer."):
            metadata[key] = value
    write_gguf(path, metadata, names if blocks is None else Packed(names, blocks), force=force)
