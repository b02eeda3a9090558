"""GGUF files, read strictly and lazily: metadata at once, tensors when they are asked for.

Layout (ggml, docs/gguf.md), little-endian: magic, version, counts; key/value pairs; for each tensor
its name, sizes (innermost first), type and offset; padding; the data. Every count and size is
checked against the bytes that are left before anything of that size is made.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import FileError
from polyhead.files.disk import map_file
from polyhead.files.gguf_blocks import TYPES, BlockType
from polyhead.files.gguf_types import ARRAY, BOOL, SCALARS, STRING, RawTensor, Typed, ValueType
from polyhead.files.views import view_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 255
MAX_STRING_BYTES = 64_000_000
MAX_ARRAY_ELEMENTS = 2_097_152  # in all arrays together; the largest vocabularies need a million
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
MAX_ELEMENTS = 2**60

# The fewest bytes one value can take: what bounds a count before it is believed.
LEAST_BYTES = {code: kind.itemsize for code, kind in SCALARS.items()} | {
    BOOL: 1,
    STRING: 8,
    ARRAY: 12,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, shape (outermost first), and where its bytes lie."""

    kind: BlockType
    shape: tuple[int, ...]
    start: int
    size: int


class GgufFile(Mapping[str, Tensor]):
    """One .gguf file: `metadata` as Python values, and tensors by name, dequantised to fp32.

    `types` keeps the stored type of every metadata value, so that a file can be written again as it
    was. Errors: FileError for whatever is not exactly a GGUF file of version 2 or 3.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = map_file(self.path)
        reader = _Reader(self.path, self._map)
        tensors, pairs = reader.counts()
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, ValueType] = {}
        for _ in range(pairs):
            reader.pair(self.metadata, self.types)
        if self.metadata.get("split.count", 1) != 1:
            count = self.metadata["split.count"]
            reader.fail(f"one of {_short(count)} split files; merge them with llama-gguf-split")
        self.entries = reader.tensors(tensors, self._alignment(reader))

    def _alignment(self, reader: "_Reader") -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
            reader.fail(f"general.alignment {_short(value)} is not a small power of two")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the file."""
        return tuple(self.entries)

    def type_of(self, name: str) -> str:
        """The tensor's type by ggml's name: F32, F16, BF16, Q4_0, Q8_0, Q6_K ..."""
        return self.entries[name].kind.name

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape as torch has it, outermost first."""
        return self.entries[name].shape

    def raw(self, name: str) -> Tensor:
        """The tensor's bytes uint8 [rows..., bytes of a row], a view of the memory map."""
        entry = self.entries[name]
        return view_bytes(self._map, entry.start, entry.size).view(*entry.shape[:-1], -1)

    def stored(self, name: str, part: int | None = None) -> RawTensor:
        """The tensor as it lies in the file, or one index of its outermost size."""
        shape, data = self.shape(name), self.raw(name)
        if part is not None:
            shape, data = shape[1:], data.view(shape[0], -1)[part].view(*shape[1:-1], -1)
        return RawTensor(self.type_of(name), shape, data)

    def typed_metadata(self) -> dict[str, Typed]:
        """The metadata with the stored types, for `write_gguf` to write as it was."""
        return {key: Typed(value, self.types[key]) for key, value in self.metadata.items()}

    def tensor(
        self, name: str, dtype: torch.dtype | None = torch.float32, part: int | None = None
    ) -> Tensor:
        """The tensor in `dtype`; None leaves plain types as stored and makes quantised ones fp32.

        part: only this index of the outermost size (one expert of a stack). What needs no change is
        a view of the map. Errors: FileError for types not read here.
        """
        try:
            return self.stored(name, part).values(dtype)
        except FileError as error:
            raise FileError(f"{self.path}: tensor {_short(name)}: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def open_gguf(path: str | Path) -> GgufFile:
    """Open a .gguf file. Errors: FileError for what is missing, truncated, or lying."""
    return GgufFile(path)


class _Reader:
    """A position in the file's bytes; each method reads one thing and checks it first."""

    def __init__(self, path: Path, buffer: Any) -> None:
        self.path = path
        self.buffer = buffer
        self.total = len(buffer)
        self.at = 0
        self.elements_left = MAX_ARRAY_ELEMENTS

    def fail(self, fault: str) -> NoReturn:
        raise FileError(f"{self.path}: {fault}")

    def need(self, size: int, what: str) -> None:
        if size > self.total - self.at:
            left = self.total - self.at
            self.fail(
                f"{what} needs {size} bytes at byte {self.at}, {left} are left; fetch it again"
            )

    def unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        self.need(form.size, what)
        values = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return values

    def counts(self) -> tuple[int, int]:
        """Magic, version and the numbers of tensors and of key/value pairs."""
        if self.buffer[:4] != MAGIC:
            self.fail(
                f"begins with {bytes(self.buffer[:4])!r}, not {MAGIC!r}; this is no GGUF file"
            )
        self.at = 4
        (version,) = self.unpack(_U32, "the version")
        if version & 0xFFFF == 0 and version:
            self.fail("is big-endian; convert it with gguf-convert-endian")
        if version not in VERSIONS:
            self.fail(f"GGUF version {version} is not 2 or 3; convert it with a current llama.cpp")
        tensors, pairs = self.unpack(_U64_PAIR, "the counts")
        left = self.total - self.at
        # The least a pair or a tensor can take: key, type and value; name, sizes, type and offset.
        if pairs > min(MAX_KEYS, left // 14):
            self.fail(f"claims {pairs} metadata keys, more than its {self.total} bytes could hold")
        if tensors > min(MAX_TENSORS, left // 25):
            self.fail(f"claims {tensors} tensors, more than its {self.total} bytes could hold")
        return tensors, pairs

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        (size,) = self.unpack(_U64, f"{what}'s length")
        if size > limit:
            self.fail(f"{what} claims {size} bytes, over the limit of {limit}; fetch it again")
        self.need(size, what)
        raw = self.buffer[self.at : self.at + size]
        self.at += size
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({_short(error.reason)}); fetch it again")
        return text

    def pair(self, metadata: dict[str, Any], types: dict[str, ValueType]) -> None:
        """One key and its value, into both tables."""
        key = self.string("a metadata key", MAX_KEY_BYTES)
        if not key or key in metadata:
            self.fail(f"the metadata key {_short(key)} is {'doubled' if key else 'empty'}")
        (code,) = self.unpack(_U32, f"the type of {_short(key)}")
        metadata[key], types[key] = self.value(key, code, 0)

    def value(self, key: str, code: int, depth: int) -> tuple[Any, ValueType]:
        if code in SCALARS:
            kind = SCALARS[code]
            self.need(kind.itemsize, _short(key))
            value = np.frombuffer(self.buffer, kind, 1, self.at).item()
            self.at += kind.itemsize
            return value, ValueType(code)
        if code == BOOL:
            return self.bools(key, 1)[0], ValueType(code)
        if code == STRING:
            return self.string(_short(key)), ValueType(code)
        if code != ARRAY:
            self.fail(f"{_short(key)} has the unknown value type {code}; fetch it again")
        return self.array(key, depth + 1)

    def array(self, key: str, depth: int) -> tuple[list[Any], ValueType]:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{_short(key)} nests arrays deeper than {MAX_ARRAY_DEPTH}; fetch it again")
        code, count = self.unpack(_ARRAY_HEAD, _short(key))
        if code not in LEAST_BYTES:
            self.fail(f"{_short(key)} has the unknown element type {code}; fetch it again")
        if count > self.elements_left:
            self.fail(f"{_short(key)} brings the array elements over {MAX_ARRAY_ELEMENTS}")
        self.need(count * LEAST_BYTES[code], f"{_short(key)} of {count} elements")
        self.elements_left -= count
        if code in SCALARS:
            kind = SCALARS[code]
            values = np.frombuffer(self.buffer, kind, count, self.at).tolist()
            self.at += count * kind.itemsize
        elif code == BOOL:
            values = self.bools(key, count)
        elif code == STRING:
            values = self.strings(_short(key), count)
        else:
            pairs = [self.array(key, depth + 1) for _ in range(count)]
            inner = {kind for _, kind in pairs} or {ValueType(ARRAY)}
            if len(inner) > 1:
                self.fail(f"{_short(key)} holds arrays of several types, which is not read here")
            return [value for value, _ in pairs], ValueType(ARRAY, inner.pop())
        return values, ValueType(ARRAY, ValueType(code))

    def bools(self, key: str, count: int) -> list[bool]:
        self.need(count, _short(key))
        values = np.frombuffer(self.buffer, np.uint8, count, self.at)
        if (values > 1).any():
            self.fail(f"{_short(key)} holds the bool {values.max()}, not 0 or 1; fetch it again")
        self.at += count
        return values.astype(bool).tolist()

    def strings(self, what: str, count: int) -> list[str]:
        """`count` strings, by one loop without calls: vocabularies have hundreds of thousands."""
        buffer, total, at, length = self.buffer, self.total, self.at, _U64.unpack_from
        values: list[str] = []
        for _ in range(count):
            if at + 8 > total:
                self.fail(f"{what} ends inside element {len(values)} of {count}; fetch it again")
            end = at + 8 + length(buffer, at)[0]
            if end > total:
                self.fail(f"{what} claims element {len(values)} ends at byte {end} of {total}")
            try:
                values.append(buffer[at + 8 : end].decode())
            except UnicodeDecodeError as error:
                self.fail(f"element {len(values)} of {what} is not UTF-8 ({_short(error.reason)})")
            at = end
        self.at = at
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, Entry]:
        """The tensors' table, then every place in it checked against the file."""
        rows: dict[str, Entry] = {}
        for _ in range(count):
            name, entry = self.tensor(alignment)
            if name in rows:
                self.fail(f"the tensor name {_short(name)} appears twice; fetch it again")
            rows[name] = entry
        data_start = self.at + -self.at % alignment
        end_before, name_before = data_start, ""
        for name, row in sorted(rows.items(), key=lambda item: item[1].start):
            start = data_start + row.start
            if start < end_before:
                self.fail(f"tensor {_short(name)} overlaps {_short(name_before)}; fetch it again")
            end_before, name_before = start + row.size, name
            if end_before > self.total:
                self.fail(
                    f"tensor {_short(name)} ends at byte {end_before}, the file at {self.total}; "
                    "fetch it again"
                )
        return {n: Entry(e.kind, e.shape, data_start + e.start, e.size) for n, e in rows.items()}

    def tensor(self, alignment: int) -> tuple[str, Entry]:
        name = self.string("a tensor name", MAX_NAME_BYTES)
        what = f"tensor {_short(name)}"
        if not name:
            self.fail("a tensor has an empty name; fetch it again")
        (num_dims,) = self.unpack(_U32, what)
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"{what} has {num_dims} dimensions, not 1 to {MAX_DIMS}; fetch it again")
        shape = self.unpack(struct.Struct(f"<{num_dims}Q"), what)[::-1]
        code, offset = self.unpack(_TENSOR_TAIL, what)
        kind = TYPES.get(code)
        if kind is None:
            self.fail(f"{what} has the unknown type {code}; fetch it again or update polyhead")
        elements = 1
        for size in shape:
            elements *= size
        if not 1 <= elements <= MAX_ELEMENTS:
            self.fail(f"{what} has the impossible shape {list(shape)}; fetch it again")
        if shape[-1] % kind.weights:
            self.fail(
                f"{what} has rows of {shape[-1]}, no multiple of {kind.name}'s {kind.weights}"
            )
        if offset % alignment:
            self.fail(f"{what} has offset {offset}, no multiple of the alignment {alignment}")
        return name, Entry(kind, shape, offset, elements // kind.weights * kind.size)


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_U64_PAIR = struct.Struct("<QQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_TENSOR_TAIL = struct.Struct("<IQ")


def _short(value: object) -> str:
    """A value from a file as one short line: files lie, and their lies may be long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
