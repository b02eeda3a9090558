"""The types of GGUF's metadata values, and a tensor as it lies in a file."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import FileError
from polyhead.files.gguf_blocks import BY_NAME, can_dequantize, dequantize
from polyhead.files.views import view_as

# GGUF's value types: code -> little-endian numpy type. Bool, string and array have their own code.
SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
BOOL, STRING, ARRAY = 7, 8, 9
VALUE_NAMES = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": BOOL,
    "string": STRING,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


@dataclass(frozen=True)
class ValueType:
    """The type a metadata value is stored as; `item` is the type of an array's elements."""

    code: int
    item: "ValueType | None" = None


@dataclass(frozen=True)
class Typed:
    """A metadata value with the type it is to be stored as."""

    value: Any
    type: ValueType


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in a file: blocks of `kind` (ggml's name), uint8, and the torch shape."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor

    def values(self, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The numbers in `dtype`; None leaves plain types as stored, quantised ones become fp32.

        What needs no change shares memory. Errors: FileError for types not read here.
        """
        kind = BY_NAME[self.kind]
        if not can_dequantize(kind):
            raise FileError(
                f"{kind.name} is not read here; take a file in F16, BF16, Q8_0, Q4_0 to Q5_1, or "
                "Q4_K to Q6_K"
            )
        data = self.data.reshape(-1)
        if kind.dtype is not None:
            values = view_as(data, kind.dtype)
            return values.to(dtype or values.dtype).view(self.shape)
        blocks = view_as(data, torch.float16).view(torch.uint8)  # scales are read as fp16
        return dequantize(blocks, kind, dtype or torch.float32).view(self.shape)
