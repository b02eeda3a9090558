"""Writing GGUF version 3, little-endian, whole or not at all.

Python values say most types themselves (llama.cpp's habits: integers are uint32, floats float32,
lists of integers int32); where the type matters wrap the value: `typed(3, "uint64")`.
"""

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file
from polyhead.files.gguf import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS
from polyhead.files.gguf_blocks import BY_NAME, TYPES, BlockType
from polyhead.files.gguf_types import (
    ARRAY,
    BOOL,
    SCALARS,
    STRING,
    VALUE_NAMES,
    RawTensor,
    Typed,
    ValueType,
)
from polyhead.files.views import tensor_bytes

VERSION = 3
MAX_NAME_BYTES = 63  # ggml keeps names in 64 bytes with a closing zero

PLAIN = {row.dtype: row for row in TYPES.values() if row.dtype is not None}


def typed(value: Any, kind: str) -> Typed:
    """Store `value` as "uint32", "float32", "string" ...; for a list this names its elements' type.

    Errors: FileError for a kind that GGUF does not have.
    """
    if kind not in VALUE_NAMES:
        raise FileError(f"GGUF has no value type {kind!r}; use one of {', '.join(VALUE_NAMES)}")
    plain = ValueType(VALUE_NAMES[kind])
    return Typed(value, ValueType(ARRAY, plain) if isinstance(value, list | tuple) else plain)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor | RawTensor],
    *,
    force: bool = False,
) -> None:
    """Write `metadata` (values or `Typed`) and `tensors` (torch, or raw blocks) in the order given.

    `tensors` is read twice, first for the shapes. The file appears under its name only when it is
    complete. Errors: FileError where a file stands already (unless `force`), for values that fit no
    type, and for tensors GGUF cannot hold.
    """
    path = Path(path)
    if path.exists() and not force:
        raise FileError(f"{path}: exists already; choose another name or force it")
    pairs = {key: _resolve(path, key, value) for key, value in metadata.items()}
    alignment = DEFAULT_ALIGNMENT
    if "general.alignment" in pairs:
        alignment = pairs["general.alignment"].value
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise FileError(f"{path}: general.alignment {alignment!r} is not a power of two")
    table, offset = [], 0
    for name, tensor in tensors.items():
        kind, shape, size = _describe(path, name, tensor)
        table.append(_tensor_row(path, name, kind, shape, offset))
        offset += size + -size % alignment
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        head = MAGIC + struct.pack("<IQQ", VERSION, len(table), len(pairs))
        head += b"".join(_pair_bytes(path, key, value) for key, value in pairs.items())
        head += b"".join(table)
        file.write(head + bytes(-len(head) % alignment))
        for name in tensors:
            _write_data(file, tensors[name], alignment)


def _write_data(file: BinaryIO, tensor: Tensor | RawTensor, alignment: int) -> None:
    data = tensor_bytes(tensor.data if isinstance(tensor, RawTensor) else tensor)
    file.write(data)
    file.write(bytes(-data.nbytes % alignment))


def _describe(
    path: Path, name: str, tensor: Tensor | RawTensor
) -> tuple[BlockType, tuple[int, ...], int]:
    """A tensor's type, torch shape and size in bytes, checked."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, RawTensor):
        kind = BY_NAME.get(tensor.kind)
    else:
        kind = PLAIN.get(tensor.dtype)
    if kind is None:
        given = tensor.kind if isinstance(tensor, RawTensor) else tensor.dtype
        raise FileError(f"{path}: tensor {name!r} is {given}, which GGUF cannot hold; convert it")
    if not 1 <= len(shape) <= MAX_DIMS or 0 in shape or shape[-1] % kind.weights:
        raise FileError(
            f"{path}: tensor {name!r} of {kind.name} has shape {list(shape)}; GGUF wants 1 to "
            f"{MAX_DIMS} sizes above 0, the last a multiple of {kind.weights}"
        )
    size = kind.size
    for length in (*shape[:-1], shape[-1] // kind.weights):
        size *= length
    if isinstance(tensor, RawTensor) and tensor.data.nbytes != size:
        raise FileError(
            f"{path}: tensor {name!r} has {tensor.data.nbytes} bytes of {kind.name}, its shape "
            f"{list(shape)} needs {size}"
        )
    return kind, shape, size


def _tensor_row(
    path: Path, name: str, kind: BlockType, shape: tuple[int, ...], offset: int
) -> bytes:
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise FileError(f"{path}: tensor name {name!r} is not 1 to {MAX_NAME_BYTES} bytes long")
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _string_bytes(name) + sizes + struct.pack("<IQ", kind.code, offset)


def _resolve(path: Path, key: str, value: Any) -> Typed:
    if isinstance(value, Typed):
        return value
    kind = _infer(value)
    if kind is None:
        raise FileError(f"{path}: {key} = {str(value)[:60]!r} fits no GGUF type; give it another")
    return Typed(value, kind)


def _infer(value: Any) -> ValueType | None:
    """The type a Python value is stored as when nobody says."""
    if isinstance(value, bool):
        return ValueType(BOOL)
    if isinstance(value, str):
        return ValueType(STRING)
    if isinstance(value, float):
        return ValueType(VALUE_NAMES["float32"])
    if isinstance(value, int):
        return _first_that_holds([value], ("uint32", "int32", "uint64", "int64"))
    if isinstance(value, list | tuple):
        item = _infer_item(value)
        return ValueType(ARRAY, item) if item else None
    return None


def _infer_item(values: list[Any] | tuple[Any, ...]) -> ValueType | None:
    kinds = {type(value) for value in values}
    if kinds == {int}:
        return _first_that_holds(values, ("int32", "uint32", "int64", "uint64"))
    if kinds == {int, float}:
        return ValueType(VALUE_NAMES["float32"])
    if not values:
        return ValueType(STRING)
    items = {_infer(value) for value in values} if kinds <= {list, tuple} else {_infer(values[0])}
    return items.pop() if len(kinds) == 1 and len(items) == 1 else None


def _first_that_holds(values: Iterable[int], kinds: tuple[str, ...]) -> ValueType | None:
    low, high = min(values), max(values)
    for kind in kinds:
        least, most = _limits(SCALARS[VALUE_NAMES[kind]])
        if least <= low and high <= most:
            return ValueType(VALUE_NAMES[kind])
    return None


def _pair_bytes(path: Path, key: str, typed_value: Typed) -> bytes:
    kind = typed_value.type
    try:
        value = _value_bytes(typed_value.value, kind)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        shown = str(typed_value.value)[:60]
        raise FileError(f"{path}: {key} = {shown!r} does not fit its type ({error})") from None
    return _string_bytes(key) + struct.pack("<I", kind.code) + value


def _value_bytes(value: Any, kind: ValueType) -> bytes:
    if kind.code == STRING:
        return _string_bytes(value)
    if kind.code != ARRAY:
        return _scalars_bytes([value], kind.code)
    item = kind.item or ValueType(STRING)
    head = struct.pack("<IQ", item.code, len(value))
    if item.code in (STRING, ARRAY):
        return head + b"".join(_value_bytes(part, item) for part in value)
    return head + _scalars_bytes(value, item.code)


def _scalars_bytes(values: list[Any], code: int) -> bytes:
    kind = SCALARS.get(code)
    wanted = bool if kind is None else (int, float) if kind.kind == "f" else int
    for value in values:
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not None):
            raise TypeError(f"not {value!r}")
    if kind is None:
        return bytes(values)
    low, high = _limits(kind)
    if kind.kind != "f" and values and not (low <= min(values) and max(values) <= high):
        raise ValueError(f"not within {low} to {high}")
    return np.array(values, dtype=kind).tobytes()


def _limits(kind: np.dtype[Any]) -> tuple[int, int]:
    bits = 8 * kind.itemsize
    return (0, 2**bits - 1) if kind.kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _string_bytes(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
