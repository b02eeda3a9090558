"""Checkpoints in parts: every rank writes what it holds, and any number of ranks read it.

By torch.distributed.checkpoint (DCP), in its safetensors form: nothing in these files is executed.
Saving is synchronous: an asynchronous save may write what later steps made of the tensors
(pytorch/pytorch#144657).
"""

import mmap
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from polyhead.errors import FileError
from polyhead.train.ranks import line

_ALIGNED = 64


def write_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's parts of tensors, and its share of what all hold alike; all ranks come."""
    import torch.distributed.checkpoint as dcp

    with _one_line():
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)


def read_parts(folder: Path, into: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, or this rank's parts of them, from parts or whole files of safetensors.

    All ranks come, unless this one reads by itself (`alone`).
    """
    import torch.distributed.checkpoint as dcp

    alone = alone or not dist.is_initialized()
    with _one_line(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(dict(into), storage_reader=reader, no_dist=alone)


def shapes_of(folder: Path) -> dict[str, torch.Size]:
    """The whole shapes of the tensors in a folder."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: row.size for name, row in found.items() if isinstance(row, TensorStorageMetadata)}


@contextmanager
def _one_line() -> Generator[None]:
    """What DCP tells all ranks of one's failure, as a FileError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as several:
        rank, (cause, _) = next(iter(several.failures.items()))
        where = f"rank {rank}: " if dist.is_initialized() else ""
        raise FileError(f"{where}{line(cause)}; check space and permissions") from None


@contextmanager
def on_disk(path: Path, like: Mapping[str, Tensor]) -> Generator[dict[str, Tensor]]:
    """Tensors of the shapes and types of others whose numbers stand in a file, not in memory.

    The file goes when this is left. Errors: OSError where the disk has no room.
    """
    starts, size = dict[str, int](), 0
    for name, tensor in like.items():
        starts[name] = size
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    try:
        with path.open("x+b") as file:
            # A disk that is full would otherwise be told by a signal, once pages are written.
            getattr(os, "posix_fallocate", lambda *_: file.truncate(size))(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
        yield {
            name: torch.frombuffer(
                memory, dtype=tensor.dtype, count=tensor.numel(), offset=starts[name]
            ).view(tensor.shape)
            for name, tensor in like.items()
        }
    finally:
        path.unlink(missing_ok=True)
