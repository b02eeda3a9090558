"""GGUF's blocks as a model's weights: kept as they lie in the file's memory map, none unpacked."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.formats import Int4, Int8, PackedWeight, Rows
from polyhead.compress.layers import (
    EXPERT_WEIGHTS,
    PackedTable,
    put_in_experts,
    put_in_layer,
    tie_packed,
)
from polyhead.errors import ConfigError
from polyhead.files.gguf_blocks import DEQUANTIZERS
from polyhead.files.gguf_types import RawTensor
from polyhead.files.views import view_as
from polyhead.models import gguf
from polyhead.models.gguf_tensors import HfTensors
from polyhead.models.load import Checkpoint
from polyhead.models.model import TaskModel, checkpoint_rules
from polyhead.models.places import Source, source_of
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import Experts

_ALL = slice(None)
_LAYERS = (nn.Linear, LanguageHead, TokenEmbedding)  # these very classes, as `quantize` has it


class Blocks(PackedWeight):
    """Rows of blocks of any of GGUF's kinds, unpacked by that kind's own arithmetic."""

    data: Tensor  # uint8 [R, bytes of a row]

    def __init__(self, like: Tensor, kind: str, data: Tensor) -> None:
        super().__init__(like)
        self.kind = kind
        self._hold("data", data)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        some = self.data[rows]
        return RawTensor(self.kind, (len(some), self.shape[1]), some).values(self.dtype)

    def extra_repr(self) -> str:
        return self.kind


def kinds_named(packed: bool | str | Collection[str]) -> tuple[str, ...]:
    """The kinds of blocks to keep: all, none, or those that are named.

    Errors: ConfigError for one that is not read here.
    """
    if isinstance(packed, bool):
        return tuple(DEQUANTIZERS) if packed else ()
    kinds = (packed,) if isinstance(packed, str) else tuple(packed)
    for kind in kinds:
        if kind not in DEQUANTIZERS:
            raise ConfigError(f"packed names {kind!r}: choose of {', '.join(DEQUANTIZERS)}")
    return kinds


def read(path: Path) -> Checkpoint:
    """A GGUF file's checkpoint, in which tensors in blocks wait on the meta device for `fill`.

    Errors: ConfigError for another file.
    """
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} is no GGUF file, so it has no blocks to keep; quantize it")
    config, tensors, _ = gguf.read(path, outlined=True)
    return config, tensors


def fill(kinds: Collection[str], model: TaskModel, tensors: Mapping[str, Tensor]) -> None:
    """Give a model that `read` has left without weights its blocks, of other kinds their values."""
    assert isinstance(tensors, HfTensors)
    file = _File(model, tensors, kinds)
    for name, layer in list(model.named_modules()):
        if model.is_tied and isinstance(layer, LanguageHead):
            continue
        waiting = {k: like for k, like in layer.named_parameters(recurse=False) if like.is_meta}
        packed = {k: file.packed(f"{name}.{k}", like) for k, like in waiting.items()}
        packed = {k: weight for k, weight in packed.items() if weight is not None}
        if type(layer) is Experts and packed.keys() == set(EXPERT_WEIGHTS):
            put_in_experts(layer, packed)
        elif type(layer) in _LAYERS and "weight" in packed:
            put_in_layer(layer, packed["weight"])
        else:
            for k, like in waiting.items():
                setattr(layer, k, nn.Parameter(file.values(f"{name}.{k}", like)))
    if model.is_tied:
        _tie(model)


def packed_blocks(raw: RawTensor, like: Tensor) -> PackedWeight:
    """A matrix of blocks as the form that has just its numbers; `like` gives shape and dtype."""
    rows = view_as(raw.data.reshape(-1), torch.float16).view(torch.uint8).view(raw.shape[0], -1)
    make = _FORMS.get(raw.kind)
    found = None if make is None else make(rows, like)
    return Blocks(like, raw.kind, rows) if found is None else found


def _q4_0(rows: Tensor, like: Tensor) -> PackedWeight | None:
    blocks = rows.unflatten(1, (-1, 18))
    scales = _halves(blocks, 0)
    least = scales * -8
    if not least.isfinite().all():
        return None
    return Int4.holding(like, codes=blocks[..., 2:], scales=scales, least=least)


def _q4_1(rows: Tensor, like: Tensor) -> PackedWeight:
    blocks = rows.unflatten(1, (-1, 20))
    scales, least = _halves(blocks, 0), _halves(blocks, 2)
    return Int4.holding(like, codes=blocks[..., 4:], scales=scales, least=least)


def _q8_0(rows: Tensor, like: Tensor) -> PackedWeight:
    blocks = rows.unflatten(1, (-1, 34))
    codes = blocks[..., 2:].view(torch.int8)
    return Int8.holding(like, codes=codes, scales=_halves(blocks, 0))


_FORMS: Mapping[str, Callable[[Tensor, Tensor], PackedWeight | None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
FAST = tuple(_FORMS)
"""The kinds whose blocks `pack` has products for."""


def _halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at a byte of every block `[R, groups]`."""
    return blocks[..., at : at + 2].view(torch.float16).squeeze(-1)


def _tie(model: TaskModel) -> None:
    embedding: Any = getattr(model.backbone, "embedding")  # noqa: B009
    if not isinstance(embedding, PackedTable):
        model.tie()
        return
    assert model.head is not None
    for part in model.head.modules():
        if isinstance(part, LanguageHead):
            tie_packed(part, embedding)


class _File:
    """A model's weights in a GGUF file, by their names in the model."""

    def __init__(self, model: TaskModel, tensors: HfTensors, kinds: Collection[str]) -> None:
        self.tensors, self.kinds = tensors, kinds
        self.rules = checkpoint_rules(model.config, model.head_kind)
        self.shapes = {_own(name): like.shape for name, like in model.named_parameters()}

    def packed(self, name: str, like: Tensor) -> PackedWeight | None:
        """The weight as a matrix of blocks, experts one below the other; None to be unpacked."""
        raw = self._raw(name)
        if raw is None or raw.kind not in self.kinds or like.ndim < 2:
            return None
        width = like.shape[-1]
        flat = replace(raw, shape=(like.numel() // width, width))
        return packed_blocks(flat, torch.empty(flat.shape, dtype=like.dtype, device="meta"))

    def values(self, name: str, like: Tensor) -> Tensor:
        """The weight unpacked."""
        if (raw := self._raw(name)) is not None:
            return raw.values(like.dtype).view(like.shape)
        place = self._place(name)
        found = [self.tensors.tensor(each, like.dtype) for each in place.names]
        whole = torch.stack(found) if place.is_stack else found[0]
        return (whole.mT if place.is_turned and whole.ndim > 1 else whole)[place.rows].contiguous()

    def _raw(self, name: str) -> RawTensor | None:
        place = self._place(name)
        if place.is_stack:
            return self.tensors.stored_stack(place.names)
        raw = self.tensors.stored(place.names[0], place.is_turned)
        if raw is None:
            return None
        data = raw.data[place.rows]
        return replace(raw, shape=data.shape[:1] + raw.shape[1:], data=data)

    def _place(self, name: str) -> Source:
        place = source_of(self.rules, _own(name), self.shapes)
        assert place is not None, f"no rule says where {name} lies"
        return place


def _own(name: str) -> str:
    return name.removeprefix("backbone.")
