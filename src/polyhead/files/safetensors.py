"""Safetensors files and checkpoint directories, read strictly and lazily, written atomically.

Layout: uint64 N (little-endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from polyhead.errors import FileError
from polyhead.files.disk import map_file
from polyhead.files.views import view_as, view_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 65_536
MAX_JSON_PARTS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_DIMS = 16
MAX_ELEMENTS = 2**60

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type, its shape, and where its bytes lie in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsFile(Mapping[str, Tensor]):
    """One .safetensors file: names to tensors that share the file's (private) memory map.

    Errors: FileError for a file that is not exactly what its header says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._map = map_file(self.path)
        self.entries, self.metadata = _read_header(self.path, self._map)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        data = view_bytes(self._map, entry.start, entry.size)
        if entry.dtype == torch.bool:  # a byte that is neither 0 nor 1 would be undefined as a bool
            return (data != 0).reshape(entry.shape)
        return view_as(data, entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


class ShardedCheckpoint(Mapping[str, Tensor]):
    """A directory's model.safetensors.index.json and the files it names, as one mapping.

    Errors: FileError for a faulty index, a missing shard, or a tensor its shard does not hold.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        self._homes = _read_index(self.path / INDEX)
        self._shards: dict[str, SafetensorsFile] = {}
        for shard in sorted(set(self._homes.values())):
            if not (self.path / shard).is_file():
                raise FileError(
                    f"{self.path / INDEX}: names {shard}, which is not there; fetch it too"
                )
            self._shards[shard] = SafetensorsFile(self.path / shard)
        for name, shard in self._homes.items():
            if name not in self._shards[shard]:
                raise FileError(
                    f"{self.path / shard}: lacks tensor {short(name)} that the index puts there; "
                    "fetch shards and index of one revision"
                )

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self._homes[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, name: object) -> bool:
        return name in self._homes


def open_checkpoint(path: str | Path) -> Mapping[str, Tensor]:
    """Open a .safetensors file, or a directory with one or with an index and shards; lazily.

    Errors: FileError for anything else, a directory of pickles (`.bin`, `.pt`) included.
    """
    path = Path(path)
    if not path.is_dir():
        return SafetensorsFile(path)
    if (path / SINGLE).is_file():
        return SafetensorsFile(path / SINGLE)
    if (path / INDEX).is_file():
        return ShardedCheckpoint(path)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return SafetensorsFile(others[0])
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise FileError(
            f"{path}: holds only the pickle {pickles[0].name}, which could run code and is never "
            f"opened; save the model as {SINGLE}"
        )
    found = f"{len(others)} other .safetensors files" if others else "no .safetensors file"
    raise FileError(
        f"{path}: no {SINGLE} and no {INDEX} ({found}); name the file or the right directory"
    )


def _read_header(path: Path, buffer: Any) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse and check everything a header promises, before any tensor is made."""
    total = len(buffer)
    if total < 8:
        raise FileError(f"{path}: {total} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(buffer[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise FileError(
            f"{path}: header length {length} exceeds {MAX_HEADER_BYTES}; this is no safetensors"
        )
    if 8 + length > total:
        raise FileError(
            f"{path}: header length {length} runs past the file's {total} bytes; fetch it again"
        )
    header = _parse_json(path, buffer[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ is not a table of strings; write the file again")
    if len(header) > MAX_ENTRIES:
        raise FileError(f"{path}: {len(header)} tensors exceed {MAX_ENTRIES}; split the file")
    data_start = 8 + length
    entries = {name: _read_entry(path, name, row, data_start) for name, row in header.items()}
    _check_tiling(path, entries, data_start, total)
    return entries, metadata


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    """Parse one object without duplicate keys; what it may allocate is bounded before parsing."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            double = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise FileError(f"{path}: the key {short(double)} appears twice; write the file again")
        return table

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > MAX_JSON_PARTS:
        raise FileError(f"{path}: the JSON has more than {MAX_JSON_PARTS} parts; split the file")
    try:
        text = raw.decode("utf-8")
        del raw  # a header may be large; one copy of it is enough
        table = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        fault = str(error).splitlines()[0][:120]
        raise FileError(f"{path}: the JSON is faulty ({fault}); fetch the file again") from None
    if not isinstance(table, dict):
        raise FileError(
            f"{path}: the JSON is a {type(table).__name__}, not an object; fetch it again"
        )
    return table


def _read_entry(path: Path, name: str, row: Any, data_start: int) -> Entry:
    """Check one row of the header by itself; positions come out relative to the file."""

    def fail(fault: str) -> NoReturn:
        raise FileError(f"{path}: tensor {short(name)}: {fault}; fetch or write the file again")

    if not is_name(name):
        fail(f"its name is not 1 to {MAX_NAME_BYTES} bytes of UTF-8")
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        fail("its row is not {dtype, shape, data_offsets}")
    dtype = DTYPES.get(row["dtype"]) if isinstance(row["dtype"], str) else None
    if dtype is None:
        fail(f"unknown dtype {short(row['dtype'])}")
    shape, offsets = row["shape"], row["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        fail(f"shape {short(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        fail(f"data_offsets {short(offsets)} are not two integers")
    if len(shape) > MAX_DIMS:
        fail(f"{len(shape)} dimensions exceed {MAX_DIMS}")
    if _product(shape, at_least=1) > MAX_ELEMENTS:
        fail(f"shape {short(shape)} has too many elements")
    begin, end = offsets
    if not 0 <= begin <= end:
        fail(f"data_offsets {short(offsets)} are not 0 <= begin <= end")
    needed = _product(shape) * dtype.itemsize
    if end - begin != needed:
        given = short(end - begin)
        fail(f"shape {short(shape)} of {row['dtype']} needs {needed} bytes, not {given}")
    return Entry(dtype, tuple(shape), data_start + begin, needed)


def _check_tiling(path: Path, entries: Mapping[str, Entry], data_start: int, total: int) -> None:
    """The tensors must fill the data from its first byte to the file's last: no gap, no overlap."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            fault = "overlaps another" if entry.start < position else "leaves a gap before it"
            raise FileError(
                f"{path}: tensor {short(name)} {fault} (begins at byte {short(entry.start)}, "
                f"expected {position}); fetch the file again"
            )
        position += entry.size
        if position > total:
            raise FileError(
                f"{path}: tensor {short(name)} ends at byte {short(position)}, the file at "
                f"{total}; fetch the file again"
            )
    if position != total:
        raise FileError(
            f"{path}: {total - position} bytes after the last tensor belong to none; "
            "fetch the file again"
        )


def _read_index(path: Path) -> dict[str, str]:
    """Names of tensors to names of shards, each of which must be a plain file name."""
    buffer = map_file(path)
    if len(buffer) > MAX_HEADER_BYTES:
        raise FileError(f"{path}: {len(buffer)} bytes exceed {MAX_HEADER_BYTES}; this is no index")
    homes = _parse_json(path, buffer[:]).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(v, str) for v in homes.values()):
        raise FileError(f"{path}: weight_map is not a table of file names; fetch the index again")
    for shard in set(homes.values()):
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", shard):
            raise FileError(
                f"{path}: shard {short(shard)} is not the plain name of a .safetensors file here; "
                "do not use this index"
            )
    return homes


def is_name(name: str) -> bool:
    """Whether a file may call a tensor so."""
    try:
        return 0 < len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return False


def _product(shape: list[int], at_least: int = 0) -> int:
    result = 1
    for size in shape:
        result *= max(size, at_least)
    return result


def short(value: object) -> str:
    """A value from a file as one short line: files lie, and their lies may be long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
