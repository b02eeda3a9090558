"""A model in few bits as a GGUF file, code by code: what int4, int8 and halves have a kind for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.formats import FORMATS, Half, Int4, Int8, PackedWeight
from polyhead.compress.saved import PackedModel, packed_matrices
from polyhead.errors import ConfigError
from polyhead.files.gguf_blocks import BY_NAME
from polyhead.files.gguf_types import RawTensor
from polyhead.models import gguf
from polyhead.models.gguf_config import family_of_config
from polyhead.models.gguf_tensors import BlockTensors
from polyhead.models.model import TaskModel
from polyhead.nn.moe import Experts

BLOCK = 32  # weights
_KINDS: Mapping[type[PackedWeight], str] = {Int4: "Q4_1", Int8: "Q8_0"}


def write_gguf(
    path: str | Path,
    model: PackedModel,
    config: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write int4 as Q4_1, int8 as Q8_0 and halves as F16 or BF16; nothing is rounded again.

    config, tokenizer: as `gguf.write` takes them. Errors: ConfigError for a family or a form that
    GGUF does not know and for rows that its blocks do not divide, FileError from writing.
    """
    check(config, *(weight.name for weight, _ in packed_matrices(model).values()))
    gguf.write(path, config, _Blocks(model), tokenizer, force=force)


def check(config: Mapping[str, Any], *forms: str) -> None:
    """ConfigError for a family or a form that GGUF does not know."""
    family_of_config(config)
    for form in forms:
        if form != "none" and not issubclass(FORMATS[form], (*_KINDS, Half)):
            raise ConfigError(
                f"GGUF has no kind for {form}: choose int4, int8, fp16 or bf16, or write a "
                "directory"
            )


def check_widths(model: TaskModel, form: str) -> None:
    """ConfigError for a layer whose rows GGUF's blocks do not divide, before it is packed."""
    if not issubclass(FORMATS[form], tuple(_KINDS)):
        return
    for name, part in model.backbone.named_modules(prefix="backbone"):
        packed = part.parameters(recurse=False) if type(part) in (nn.Linear, Experts) else ()
        for weight in packed:
            if weight.ndim > 1 and weight[..., 0].numel() > 1 and weight.shape[-1] % BLOCK:
                raise _undivided(name, weight.shape[-1])


def _undivided(name: str, width: int) -> ConfigError:
    return ConfigError(
        f"{name} is {width} wide, which GGUF's blocks of {BLOCK} do not divide: write a directory"
    )


class _Blocks(BlockTensors):
    """A model's tensors, packed matrices as blocks."""

    def __init__(self, model: PackedModel) -> None:
        outline = model.outline()
        blocks: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS.values()}
        for name, (weight, _) in packed_matrices(model).items():
            rows = outline[name].shape[:-1]
            # One row is a vector in GGUF, which is never in blocks.
            if isinstance(weight, Half) or weight.shape[0] == 1:
                plain = weight.halves if isinstance(weight, Half) else weight.unpack()
                outline[name] = plain.view(*rows, -1)
            else:
                blocks[_KINDS[type(weight)]][name] = _bytes(name, weight).view(*rows, -1)
        self._tensors = model.hf_tensors(outline)
        self._raw = {
            name: (kind, tensor)
            for kind, some in blocks.items()
            for name, tensor in model.hf_tensors({**outline, **some}).items()
            if tensor.dtype == torch.uint8
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self, name: str, turned: bool = False) -> RawTensor | None:
        if name not in self._raw:
            return None
        kind, data = self._raw[name]
        data = data.T.contiguous() if turned else data
        width = data.shape[-1] // BY_NAME[kind].size * BY_NAME[kind].weights
        return RawTensor(kind, (*data.shape[:-1], width), data)

    def stored_stack(self, names: Sequence[str]) -> RawTensor | None:
        parts = [raw for name in names if (raw := self.stored(name)) is not None]
        if len(parts) < len(names):
            return None
        data = torch.stack([part.data for part in parts])
        return RawTensor(parts[0].kind, (len(parts), *parts[0].shape), data)


def _bytes(name: str, weight: PackedWeight) -> Tensor:
    """The blocks of a matrix `[R, bytes]`: of each 32 weights the steps, then the codes."""
    assert isinstance(weight, Int4 | Int8)
    if weight.shape[1] % BLOCK:
        raise _undivided(name, weight.shape[1])
    steps = [part.contiguous().view(torch.uint8).unflatten(1, (-1, 2)) for part in weight.steps()]
    return torch.cat([*steps, weight.codes.view(torch.uint8)], 2).flatten(1)
