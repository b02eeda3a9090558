"""Safetensors files and sharded checkpoints, written: whole before they take their names."""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from polyhead.errors import FileError
from polyhead.files.disk import atomic_file
from polyhead.files.safetensors import DTYPE_NAMES, INDEX, SINGLE, Entry, is_name, short
from polyhead.files.views import tensor_bytes


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write model.safetensors, or shards and their index where it would exceed `max_shard_bytes`.

    The bytes depend only on names, values and metadata. Every file is complete on disk before the
    first takes its name, and the index comes last; then files of an earlier checkpoint that readers
    would prefer or mix in are removed. `tensors` is read twice, first for the shapes.

    Errors: FileError for names and types that cannot be written, and from the system.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plan = {name: _plan_entry(directory, name, tensor) for name, tensor in tensors.items()}
    shards = _split(plan, max_shard_bytes)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [SINGLE]
    stale = _written_before(directory) - set(names)
    with ExitStack() as stack:
        # Entered first, renamed last: the index appears when all its shards stand.
        if count > 1:
            index = stack.enter_context(atomic_file(directory / INDEX))
            index.write(_index_bytes(plan, shards, names))
            stale.discard(INDEX)
        for file_name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(atomic_file(directory / file_name))
            _fill(file, plan, shard, tensors, metadata)
    for file_name in stale:
        (directory / file_name).unlink(missing_ok=True)


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file under a name of its own, complete before it takes it.

    Errors: as `write_checkpoint`.
    """
    plan = {name: _plan_entry(path.parent, name, tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as file:
        _fill(file, plan, *_split(plan, sys.maxsize), tensors, metadata)


def _fill(
    file: BinaryIO,
    plan: Mapping[str, Entry],
    names: list[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
) -> None:
    file.write(_header_bytes(plan, names, {"format": "pt", **(metadata or {})}))
    for name in names:
        file.write(tensor_bytes(tensors[name]))


def _plan_entry(directory: Path, name: str, tensor: Tensor) -> Entry:
    if name == "__metadata__" or not is_name(name):
        raise FileError(f"{directory}: tensor name {short(name)} cannot be written; rename it")
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        raise FileError(
            f"{directory}: tensor {short(name)} is {tensor.dtype} ({tensor.layout}), which "
            "safetensors cannot hold; convert it"
        )
    return Entry(tensor.dtype, tuple(tensor.shape), 0, tensor.numel() * tensor.dtype.itemsize)


def _split(plan: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Fill shards in the order of `plan`; inside each, wide types first, so all is aligned."""
    if limit <= 0:
        raise FileError(f"max_shard_bytes is {limit}; give a positive number of bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in plan.items():
        if shards[-1] and filled + entry.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.size
    return [sorted(shard, key=lambda n: (-plan[n].dtype.itemsize, n)) for shard in shards]


def _header_bytes(
    plan: Mapping[str, Entry], shard: list[str], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in shard:
        entry = plan[name]
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _index_bytes(plan: Mapping[str, Entry], shards: list[list[str]], names: list[str]) -> bytes:
    homes = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(entry.size for entry in plan.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _written_before(directory: Path) -> set[str]:
    """What an earlier write_checkpoint may have left, which readers would prefer or mix in."""
    shards = {p.name for p in directory.glob("model-*-of-*.safetensors")}
    return {name for name in (SINGLE, INDEX) if (directory / name).exists()} | {
        name for name in shards if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)
    }
