"""A checkpoint's tensors by the names of the other world: GGUF's by Hugging Face's, and back."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.files.gguf import GgufFile
from polyhead.files.gguf_blocks import BY_NAME, can_dequantize
from polyhead.files.gguf_types import RawTensor
from polyhead.models.gguf_config import family_of_config
from polyhead.models.gguf_families import Family
from polyhead.models.gguf_names import Name, Transposed
from polyhead.models.gguf_packed import ALWAYS_FLOAT

ROPE_FREQS = "rope_freqs.weight"
# Buffers of old checkpoints that hold no weights.
BUFFERS = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies: a tensor of the file, or one expert of a stack."""

    name: str
    row: Name
    part: int | None = None


class BlockTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by Hugging Face's names, of which some lie in GGUF's blocks."""

    def stored(self, name: str, turned: bool = False) -> RawTensor | None:
        """The tensor's blocks, rows in Hugging Face's order; None where it has none. turned: the
        rows are those of its transpose."""
        raise NotImplementedError

    def stored_stack(self, names: Sequence[str]) -> RawTensor | None:
        """The blocks of all experts of a stack, one after another; None as above."""
        raise NotImplementedError


class HfTensors(BlockTensors):
    """A GGUF file's tensors under Hugging Face's names, each made when it is asked for.

    Floats keep their type; quantised tensors become fp32. outlined: these have a shape alone, on
    the meta device; `stored` gives their blocks, `tensor` their values. Errors: ConfigError for a
    tensor that the architecture's table does not know.
    """

    def __init__(
        self, gguf: GgufFile, family: Family, config: Mapping[str, Any], outlined: bool = False
    ) -> None:
        self.gguf = gguf
        self.config = config
        self.outlined = outlined
        self._places: dict[str, Place] = {}
        for name in gguf.names:
            if name == ROPE_FREQS:
                continue
            row, found = _match(family, name, "gguf")
            if row is None:
                raise ConfigError(
                    f"{gguf.path}: tensor {name!r} is unknown in {family.arch}; not read here"
                )
            if "{e}" in row.hf:
                for e in range(gguf.shape(name)[0]):
                    self._places[row.hf.format(**found, e=e)] = Place(name, row, e)
            else:
                self._places[row.hf.format(**found)] = Place(name, row)

    def __getitem__(self, name: str) -> Tensor:
        return self._outline(name) if self.outlined else self.tensor(name)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype`; None keeps floats as stored and makes quantised ones fp32."""
        place = self._places[name]
        is_readable = can_dequantize(BY_NAME[self.gguf.type_of(place.name)])
        raw = self.stored(name) if place.row.change and is_readable else None
        if raw is not None:  # rows are put in order while they are packed
            return raw.values(dtype)
        values = self.gguf.tensor(place.name, dtype, place.part)
        return place.row.change.to_hf(values, self.config) if place.row.change else values

    def stored(self, name: str, turned: bool = False) -> RawTensor | None:
        """The tensor's blocks, rows in Hugging Face's order; None where no row order gives it.

        That is for plain floats, and for what the two worlds do not keep by rows. turned: the rows
        are those of its transpose.
        """
        place = self._places[name]
        raw, change = self.gguf.stored(place.name, place.part), place.row.change
        is_plain = BY_NAME[raw.kind].dtype is not None
        if is_plain or turned != isinstance(change, Transposed):
            return None
        if change is None or turned:
            return raw
        if not change.on_rows:
            return None
        return RawTensor(raw.kind, raw.shape, change.to_hf(raw.data, self.config))

    def stored_stack(self, names: Sequence[str]) -> RawTensor | None:
        """The blocks of all experts of a stack, which lie one after another; None as above."""
        whole = {self._places[name].name for name in names}
        parts = [self._places[name].part for name in names]
        raw = self.gguf.stored(whole.pop())
        is_plain = BY_NAME[raw.kind].dtype is not None
        return None if is_plain or whole or parts != list(range(raw.shape[0])) else raw

    def _outline(self, name: str) -> Tensor:
        place = self._places[name]
        raw, change = self.gguf.stored(place.name, place.part), place.row.change
        if BY_NAME[raw.kind].dtype is not None or not can_dequantize(BY_NAME[raw.kind]):
            return self.tensor(name)
        shape = torch.empty(raw.shape, device="meta")
        return shape if change is None else change.to_hf(shape, self.config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


class GgufTensors(Mapping[str, Tensor | RawTensor]):
    """A Hugging Face checkpoint's tensors under GGUF's names, each made when it is asked for.

    What comes of a GGUF file in blocks stays in them. Errors: ConfigError for a tensor that GGUF
    has no name for, and for one that is missing.
    """

    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        freqs: Tensor | None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self._extra = {} if freqs is None else {ROPE_FREQS: freqs}
        self._sources: dict[str, tuple[Name, dict[int, str]]] = {}
        for name in tensors:
            if BUFFERS.fullmatch(name) or (name == "lm_head.weight" and _is_tied(config, tensors)):
                continue
            row, found = _match_hf(family, name)
            expert = found.pop("e", 0)
            parts = self._sources.setdefault(row.gguf.format(**found), (row, {}))[1]
            parts[expert] = name
        self._check_complete(family)

    def _check_complete(self, family: Family) -> None:
        layers = self.config[family.keys["block_count"]]
        experts = self.config.get("num_experts") or self.config.get("num_local_experts") or 1
        for row in family.names:
            for i in range(layers if "{i}" in row.gguf else 1):
                parts = self._sources.get(row.gguf.format(i=i), (row, {}))[1]
                wanted = range(experts if "{e}" in row.hf else 1)
                lacking = [e for e in wanted if e not in parts]
                if lacking and not (row.optional and not parts):
                    name = row.hf.format(i=i, e=lacking[0])
                    raise ConfigError(f"the checkpoint lacks {name}, which {family.arch} needs")

    def __getitem__(self, name: str) -> Tensor | RawTensor:
        if name in self._extra:
            return self._extra[name]
        row, parts = self._sources[name]
        if (raw := self._stored(row, [parts[e] for e in sorted(parts)])) is not None:
            return raw
        tensor = self.tensors[parts[0]]
        if "{e}" in row.hf:
            tensor = torch.stack([self.tensors[parts[e]] for e in sorted(parts)])
        tensor = row.change.to_gguf(tensor, self.config) if row.change else tensor
        always = tensor.dim() == 1 or name.endswith(ALWAYS_FLOAT)
        return tensor.float() if always else tensor

    def _stored(self, row: Name, names: Sequence[str]) -> RawTensor | None:
        if not isinstance(self.tensors, BlockTensors):
            return None
        if "{e}" in row.hf:
            return self.tensors.stored_stack(names)
        raw = self.tensors.stored(names[0], turned=isinstance(row.change, Transposed))
        if raw is None or row.change is None or not row.change.on_rows:
            return raw
        return replace(raw, data=row.change.to_gguf(raw.data, self.config))

    def __iter__(self) -> Iterator[str]:
        yield from self._sources
        yield from self._extra

    def __len__(self) -> int:
        return len(self._sources) + len(self._extra)


def _is_tied(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head repeats the embedding; GGUF says so by leaving it out."""
    family = family_of_config(config)
    if not config.get("tie_word_embeddings", family.model_type == "gpt2"):
        return False
    embedding = next(row.hf for row in family.names if row.gguf == "token_embd.weight")
    if embedding in tensors and not torch.equal(tensors[embedding], tensors["lm_head.weight"]):
        raise ConfigError(
            "tie_word_embeddings is true, yet lm_head.weight differs from the embedding; "
            "set it to false"
        )
    return True


def _match_hf(family: Family, name: str) -> tuple[Name, dict[str, int]]:
    """The row of a Hugging Face name, with or without the prefix a model with a head has."""
    prefix = "transformer." if family.model_type == "gpt2" else "model."
    for candidate in (name, prefix + name):
        row, found = _match(family, candidate, "hf")
        if row is not None:
            return row, found
    raise ConfigError(f"tensor {name!r} has no name in GGUF's {family.arch}; save as safetensors")


def _match(family: Family, name: str, side: str) -> tuple[Name | None, dict[str, int]]:
    for row in family.names:
        match = _pattern(getattr(row, side)).fullmatch(name)
        if match:
            return row, {key: int(value) for key, value in match.groupdict().items()}
    return None, {}


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>0|[1-9]\\d{0,5})", re.escape(text)))
