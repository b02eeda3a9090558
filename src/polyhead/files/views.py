"""Tensors over the bytes of a file's memory map, and the bytes of tensors."""

import mmap

import torch
from torch import Tensor


def view_bytes(buffer: mmap.mmap, start: int, size: int) -> Tensor:
    """Bytes [start, start + size) of a map as a uint8 tensor [size] that shares its memory."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=start)


def view_as(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Read a uint8 tensor [n] as `dtype`; copied first where its address is not aligned."""
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy where it lies so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
