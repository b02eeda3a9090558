"""A model in few bits on disk: a directory like any other, whose `config.json` has a manifest.

Under `quantization_config` stand a version, the form of each packed matrix by its name in the
model, and the tensors of Hugging Face's names that they take the place of. The safetensors file
holds their parts (`NAME.codes`, `NAME.scales`) and everything else as ever.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.formats import FORMATS, PackedWeight, form_named
from polyhead.compress.layers import (
    EXPERT_WEIGHTS,
    PackedExperts,
    PackedLayer,
    put_in_experts,
    put_in_layer,
    tie_vocabulary,
)
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import short
from polyhead.models.load import Checkpoint, read_checkpoint
from polyhead.models.model import TaskModel
from polyhead.nn.moe import Experts

KEY, METHOD, VERSION = "quantization_config", "polyhead", 1
JSON = Mapping[str, Any]
_OWN = "backbone."
_CODES = (".weight.codes", ".weight.halves")


class PackedModel(TaskModel):
    """A model whose matrices are in few bits, and which is saved so."""

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, or compute in where all are packed."""
        weights = (part for part in self.modules() if isinstance(part, PackedWeight))
        return next(chain(self.parameters(), weights)).dtype

    def save(
        self,
        directory: str | Path,
        force: bool = False,
        state: Mapping[str, Tensor] | None = None,
        *,
        floats: bool = False,
    ) -> None:
        """Write the model in few bits; `load` gives it back bit for bit.

        floats: write what it unpacks to, a plain checkpoint for any library. Raises FileError where
        a model already stands and `force` is not given, ConfigError for one laid out by `pack`.
        """
        super().save(directory, force, self.state_dict() if floats else state)

    def stored(
        self, state: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As `TaskModel`'s; the packed matrices by their parts unless `state` gives others."""
        if state is not None:
            return super().stored(state)
        packed = packed_matrices(self)
        theirs = self.hf_tensors(self.outline())
        found = {name: tensor.detach() for name, tensor in theirs.items() if not tensor.is_meta}
        for name, (weight, _) in packed.items():
            found |= {f"{name}.{part}": buffer for part, buffer in weight.named_buffers()}
        manifest = {
            "quant_method": METHOD,
            "version": VERSION,
            "matrices": {n: {"form": w.form, "source": of} for n, (w, of) in packed.items()},
            "tensors": {n: list(tensor.shape) for n, tensor in theirs.items() if tensor.is_meta},
        }
        return {**self.hf_config(), KEY: manifest}, found

    def outline(self) -> dict[str, Tensor]:
        """The state; packed matrices stand on the meta device."""
        found: dict[str, Tensor] = {}
        for name, part in self.named_modules():
            # torch's own, as a packed layer's would unpack it.
            nn.Module._save_to_state_dict(part, found, f"{name}." if name else "", False)
            if isinstance(part, PackedLayer):
                found[f"{name}.weight"] = torch.empty(part.packed.shape, device="meta")
            elif isinstance(part, PackedExperts):
                for own, packed in part.of.items():
                    assert isinstance(packed, PackedWeight)
                    whole = torch.empty(packed.shape, device="meta")
                    found[f"{name}.{own}"] = whole.unflatten(0, (part.num_experts, -1))
        for name in self._tied():
            found.pop(name, None)
        return found


def packed_matrices(model: nn.Module) -> dict[str, tuple[PackedWeight, str | None]]:
    """What a model keeps in few bits by the names of the weights, with the digest each had.

    Errors: ConfigError for a form that is not saved.
    """
    found: dict[str, tuple[Any, str | None]] = {}
    for name, part in model.named_modules():
        if isinstance(part, PackedLayer):
            found[f"{name}.weight"] = part.packed, part.source_digest
        elif isinstance(part, PackedExperts):
            digests: Any = part.source_digests
            found |= {f"{name}.{own}": (packed, digests[own]) for own, packed in part.of.items()}
    for name, (weight, _) in found.items():
        if type(weight) not in FORMATS.values():
            raise ConfigError(
                f"{name} is laid out as {type(weight).__name__}, which is not saved: save the "
                "model before ph.pack, or with floats=True"
            )
    return found


class PackedTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by Hugging Face's names; on the meta device those in few bits."""

    def __init__(self, path: Path, file: Mapping[str, Tensor], manifest: JSON) -> None:
        self.path, self.file = path, file
        self.matrices = _matrices(path, manifest.get("matrices"))
        self._outlines = _outlines(path, manifest.get("tensors"))
        self._plain = {name for name in file if name.rpartition(".")[0] not in self.matrices}
        if both := sorted(self._plain & self._outlines.keys()):
            raise FileError(f"{path} holds {both[0]} twice, as floats and in few bits; fetch again")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._outlines:
            return torch.empty(self._outlines[name], device="meta")
        return self.file[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._outlines

    def __len__(self) -> int:
        return len(self._plain) + len(self._outlines)

    def check_read(self, read: Set[str]) -> None:
        """FileError for a matrix of the manifest that the model has not, but a head's."""
        unread = sorted(name for name in self.matrices.keys() - read if name.startswith(_OWN))
        if unread:
            raise FileError(
                f"{self.path}: {KEY} has {unread[0]}, a matrix that this model has no place for; "
                "fetch it again"
            )

    def packed(self, name: str, like: Tensor) -> PackedWeight:
        """A matrix `[R, W]`, or a stack of them one below the other, of the dtype of `like`."""
        form = form_named(self.matrices[name]["form"])
        found = form(torch.empty(like.shape, dtype=like.dtype, device="meta").flatten(0, -2))
        for part, outline in list(found.named_buffers()):
            tensor = self.file.get(f"{name}.{part}")
            if tensor is None:
                raise FileError(f"{self.path} lacks {name}.{part}; fetch or write it again")
            if tensor.shape != outline.shape or tensor.dtype != outline.dtype:
                raise FileError(
                    f"{self.path}: {name}.{part} is {tensor.dtype} {list(tensor.shape)}, and "
                    f"{found.form} of this matrix needs {outline.dtype} {list(outline.shape)}"
                )
            found.register_buffer(part, tensor, persistent=False)
        return found


def read(path: Path) -> Checkpoint:
    """As `read_checkpoint`; what is in few bits stands as tensors on the meta device for `fill`.

    Errors: FileError for a manifest that is faulty, or of a newer version.
    """
    data, tensors = read_checkpoint(path)
    manifest = data.get(KEY)
    if not isinstance(manifest, Mapping) or manifest.get("quant_method") != METHOD:
        if manifest is None and (lost := next((n for n in tensors if n.endswith(_CODES)), None)):
            raise FileError(
                f"{path} holds {lost}, a matrix in few bits, and its config.json has no {KEY} to "
                "read it by; fetch config.json again"
            )
        return data, tensors
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise _faulty(path, "version", version)
    if version > VERSION:
        raise FileError(
            f"{path} was compressed by a newer Polyhead (version {version} of the format, and "
            f"this one reads {VERSION}): update Polyhead"
        )
    plain = {key: value for key, value in data.items() if key != KEY}
    return plain, PackedTensors(path, tensors, manifest)


def fill(model: TaskModel, tensors: Mapping[str, Tensor]) -> None:
    """Put what `read` found in few bits in its places in a model."""
    if not isinstance(tensors, PackedTensors):
        return
    read: set[str] = set()
    for name, layer in list(model.named_modules()):
        waiting = {own: w for own, w in layer.named_parameters(recurse=False) if w.is_meta}
        named = {own: f"{name}.{own}" for own in waiting if f"{name}.{own}" in tensors.matrices}
        found = {own: tensors.packed(whole, waiting[own]) for own, whole in named.items()}
        digests = {own: tensors.matrices[whole]["source"] for own, whole in named.items()}
        read |= set(named.values())
        if isinstance(layer, Experts) and found.keys() == set(EXPERT_WEIGHTS):
            put_in_experts(layer, found, digests)
        elif found.keys() == {"weight"}:
            put_in_layer(layer, found["weight"], digests["weight"])
    tie_vocabulary(model)
    if lacking := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise FileError(f"{tensors.path} lacks {lacking[0]} in few bits; fetch or write it again")
    tensors.check_read(read)
    model.__class__ = PackedModel


def _matrices(path: Path, given: Any) -> Mapping[str, JSON]:
    if not isinstance(given, Mapping):
        raise _faulty(path, "matrices", given)
    for name, row in given.items():
        if not isinstance(row, Mapping) or not isinstance(row.get("source"), str | None):
            raise _faulty(path, name, row)
        try:
            form_named(str(row.get("form")))
        except ConfigError:
            raise FileError(
                f"{path}: {name} has the form {short(row.get('form'))}, which this Polyhead does "
                "not know: update it, or fetch the model again"
            ) from None
    return {name: {"source": None, **row} for name, row in given.items()}


def _outlines(path: Path, given: Any) -> Mapping[str, Sequence[int]]:
    if not isinstance(given, Mapping):
        raise _faulty(path, "tensors", given)
    for name, shape in given.items():
        is_list = isinstance(shape, list) and 1 <= len(shape) <= 8
        are_sizes = is_list and all(type(size) is int and size >= 0 for size in shape)
        if not are_sizes or prod(shape) >= 2**48:
            raise _faulty(path, name, shape)
    return given


def _faulty(path: Path, key: str, value: Any) -> FileError:
    return FileError(
        f"{path}: {KEY} has {short(key)}: {short(value)}, of no form known here; fetch it again"
    )
