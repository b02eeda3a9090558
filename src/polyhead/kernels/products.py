"""Products with weights in four or eight bits by a kernel of our own, activations in eight.

Activations are rounded to 127 steps of the largest of each 32, or of each 16 that meet weights in
eight bits by groups; sums are whole numbers, as the VNNI instructions of x86 make them. `R` rows of
a matrix in blocks of 16, `W` columns in groups of 32.
"""

import copy
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.compress.formats import STEPS, Int4, Int8, Int8Rows, PackedWeight, Rows
from polyhead.kernels.native import TYPES, address, library, takes
from polyhead.nn.feedforward import ACTIVATIONS, Activation

_ROWS = 16  # of a block
_ALL = slice(None)
ENDINGS: dict[Activation | None, int] = {
    None: 0,
    ACTIVATIONS["relu"]: 1,
    ACTIVATIONS["gelu"]: 2,
    ACTIVATIONS["gelu_tanh"]: 3,
    ACTIVATIONS["silu"]: 4,
}
"""What the kernels apply to a product before they write it, by its number there."""


class LaidOut(PackedWeight):
    """A packed matrix whose numbers lie as the kernel reads them; see products.cpp.

    rounds_twice: what the rounding of activations leaves is rounded and multiplied, too. It costs
    nothing where few tokens wait for the weights to be read, as before a language head.
    """

    kind: str
    rounds_twice = False
    scales_each = 1  # of 32 activations
    data: Tensor  # [blocks, groups, bytes]

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(torch.empty(0))
        self.shape, self.dtype = weight.shape, weight.dtype
        self.num_weights = weight.num_weights

    @staticmethod
    def of(weight: PackedWeight, rounds_twice: bool = False) -> "LaidOut | None":
        """The same matrix laid out; None where there is no kernel for it here.

        rounds_twice: where the kernel can, which is with weights in eight bits.
        """
        form = _LAID_OUT.get(type(weight))
        device = next(weight.buffers()).device
        if form is None or device.type != "cpu" or library("products") is None:
            return None
        found = form(weight)
        found.rounds_twice = rounds_twice and form is not LaidOutInt4
        return found

    def with_others(self, others: Sequence["LaidOut"]) -> "LaidOut | None":
        """One matrix of the rows of several, which become views of it; None where they differ in
        more than rows, or end within a block."""
        each = [self, *others]
        how = {(type(part), part.shape[1], part.dtype, part.rounds_twice) for part in each}
        if len(how) > 1 or any(part.shape[0] % _ROWS for part in each[:-1]):
            return None
        found = copy.copy(self)
        found._buffers = {}
        found.shape = torch.Size((sum(part.shape[0] for part in each), self.shape[1]))
        found.num_weights = sum(part.num_weights for part in each)
        for name in self._buffers:
            parts = [getattr(part, name) for part in each]
            found._hold(name, torch.cat(parts))
            views = getattr(found, name).split([len(part) for part in parts])
            for part, view in zip(each, views, strict=True):
                setattr(part, name, view)
        return found

    @property
    def times_kind(self) -> str:
        """The kernels that multiply, by name."""
        return f"{self.kind}_twice" if self.rounds_twice else self.kind

    @property
    def rounding(self) -> tuple[str, int]:
        """The kernel that rounds activations, by name, and its bytes for a token's group of 32."""
        size = STEPS + 4 * (1 + self.scales_each)
        return self.times_kind, 2 * size if self.rounds_twice else size

    def times(
        self,
        x: Tensor,
        rows: slice = _ALL,
        *,
        bias: Tensor | None = None,
        activation: Activation | None = None,
    ) -> Tensor | None:
        """x `[..., W]` by some rows `[..., n]`, with a bias `[n]`, then an activation of
        `ENDINGS`."""
        start, stop, _ = rows.indices(self.shape[0])
        if start % _ROWS or not takes(x, bias):
            return None
        kernel = library("products")
        assert kernel is not None
        x = x.contiguous()
        found = x.new_empty(*x.shape[:-1], stop - start)
        if found.numel():
            width = self.shape[1]
            data = self.data[start // _ROWS] if start else self.data
            getattr(kernel, f"product_{self.times_kind}_{TYPES[x.dtype]}")(
                address(x), address(data), self._row_scales(start),
                address(bias), ctypes.c_int32(ENDINGS[activation]), address(found),
                ctypes.c_int64(x.numel() // width), ctypes.c_int64(width),
                ctypes.c_int64(stop - start), ctypes.c_int32(torch.get_num_threads()),
            )  # fmt: skip
        return found

    def then_times(
        self,
        x: Tensor,
        down: "LaidOut",
        biases: tuple[Tensor | None, Tensor | None],
        activation: Activation | None,
    ) -> Tensor | None:
        """What `down` makes of an activation of x `[..., W]` by this matrix, each with its bias:
        `[..., down's rows]`. What stands between is rounded where it comes to be."""
        kernel = library("products")
        fits = type(self) is type(down) and not (self.rounds_twice or down.rounds_twice)
        if not fits or kernel is None or not takes(x, *biases) or not x.numel():
            return None
        x = x.contiguous()
        (inner, given), (rows, _) = self.shape, down.shape
        found = x.new_empty(*x.shape[:-1], rows)
        getattr(kernel, f"both_{self.kind}_{TYPES[x.dtype]}")(
            address(x), address(self.data), self._row_scales(0), address(biases[0]),
            ctypes.c_int32(ENDINGS[activation]), address(down.data), down._row_scales(0),
            address(biases[1]), address(found), ctypes.c_int64(x.numel() // given),
            *map(ctypes.c_int64, (given, inner, rows)), ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return found

    def _row_scales(self, start: int) -> ctypes.c_void_p:
        return address(None)

    def unpack(self, rows: Rows = _ALL) -> Tensor:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            first = start // _ROWS
            blocks = slice(first, -(-stop // _ROWS))
            found = self._unpack(blocks).transpose(1, 2).flatten(0, 1)
            found = found[start - first * _ROWS : stop - first * _ROWS]
        else:
            found = self._looked_up(rows)
            if found is not None:
                return found
            found = self._unpack(rows // _ROWS, rows % _ROWS)[:, :, 0]
        return found.flatten(1)[:, : self.shape[1]].to(self.dtype)

    def _looked_up(self, index: Tensor) -> Tensor | None:
        """Rows by their numbers `[n]`, by the kernel if it takes them; IndexError for others."""
        kernel = library("products")
        fits = index.dtype == torch.int64 and index.device.type == "cpu" and self.dtype in TYPES
        if not fits or kernel is None or not index.numel():
            return None
        first, last = torch.aminmax(index)
        if first < 0 or last >= self.shape[0]:
            raise IndexError(f"rows {first} to {last} of a matrix of {self.shape[0]}")
        found = torch.empty(len(index), self.shape[1], dtype=self.dtype)
        getattr(kernel, f"unpack_{self.kind}_{TYPES[self.dtype]}")(
            address(index.contiguous()), address(self.data), self._row_scales(0), address(found),
            *map(ctypes.c_int64, found.shape), ctypes.c_int32(torch.get_num_threads()),
        )  # fmt: skip
        return found

    def _unpack(self, blocks: Rows, lanes: Tensor | None = None) -> Tensor:
        """The weights of blocks `[n, groups, 16, 32]`, float32; lanes `[n]`: of each but that row,
        `[n, groups, 1, 32]`."""
        raise NotImplementedError


class LaidOutInt4(LaidOut):
    """`Int4`, its steps beside its codes."""

    kind = "int4"

    def __init__(self, weight: Int4) -> None:
        super().__init__(weight)
        self._hold("data", _blocks(*map(_lanes, weight.steps()), _fours(weight.codes)))

    def _unpack(self, blocks: Rows, lanes: Tensor | None = None) -> Tensor:
        scales, least, codes = self.data.split([2 * _ROWS, 2 * _ROWS, 16 * _ROWS], 2)
        scales, least = (_halves(x, blocks, lanes) for x in (scales, least))
        both = _columns(codes, blocks, lanes)
        found = torch.cat([both & 15, both >> 4], 3).flatten(3)
        return torch.addcmul(least[..., None], found, scales[..., None])


class LaidOutInt8(LaidOut):
    """`Int8`, its codes from 0, its scales beside them."""

    kind = "int8"
    scales_each = 2

    def __init__(self, weight: Int8) -> None:
        super().__init__(weight)
        codes = _fours(_from_zero(weight.codes))
        self._hold("data", _blocks(*map(_lanes, weight.steps()), codes))

    def _unpack(self, blocks: Rows, lanes: Tensor | None = None) -> Tensor:
        scales, codes = self.data.split([2 * _ROWS, STEPS * _ROWS], 2)
        found = _columns(codes, blocks, lanes).flatten(3).float() - 128
        return found * _halves(scales, blocks, lanes)[..., None]


class LaidOutInt8Rows(LaidOut):
    """`Int8Rows`, its codes from 0."""

    kind = "int8_rows"
    scales: Tensor  # [R]

    def __init__(self, weight: Int8Rows) -> None:
        super().__init__(weight)
        codes = F.pad(weight.codes, (0, -weight.shape[1] % STEPS)).unflatten(1, (-1, STEPS))
        self._hold("data", _blocks(_fours(_from_zero(codes))))
        self._hold("scales", weight.scale[:, 0].clone())

    def _row_scales(self, start: int) -> ctypes.c_void_p:
        return address(self.scales[start:] if start else self.scales)

    def _unpack(self, blocks: Rows, lanes: Tensor | None = None) -> Tensor:
        scales = F.pad(self.scales, (0, -len(self.scales) % _ROWS)).view(-1, _ROWS)[blocks]
        scales = scales if lanes is None else scales.gather(1, lanes[:, None])
        found = _columns(self.data, blocks, lanes).flatten(3).float() - 128
        return found * scales[:, None, :, None]


_LAID_OUT: dict[type[PackedWeight], Any] = {
    Int4: LaidOutInt4,
    Int8: LaidOutInt8,
    Int8Rows: LaidOutInt8Rows,
}


def _from_zero(codes: Tensor) -> Tensor:
    """Codes from -128 as bytes from 0."""
    return codes.contiguous().view(torch.uint8) ^ 128


def _halves(x: Tensor, blocks: Rows, lanes: Tensor | None) -> Tensor:
    """Of bytes of a float16 for each row of a block `[blocks, groups, 32]`: `[n, groups, 16 or 1]`
    float32."""
    x = x.view(torch.float16)
    return (x[blocks] if lanes is None else x[blocks, :, lanes][..., None]).float()


def _columns(codes: Tensor, blocks: Rows, lanes: Tensor | None) -> Tensor:
    """Bytes as `_fours` lays them by their rows `[n, groups, 16 or 1, fours, 4]`."""
    codes = codes.unflatten(2, (-1, _ROWS, 4)).transpose(2, 3)
    return codes[blocks] if lanes is None else codes[blocks, :, lanes][:, :, None]


def _lanes(x: Tensor) -> Tensor:
    """Of each group `[R, groups]`: `[blocks, groups, 16]`, rows that are none with zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % _ROWS)).unflatten(0, (-1, _ROWS)).mT.contiguous()


def _fours(codes: Tensor) -> Tensor:
    """Bytes of groups `[R, groups, n]`, four of each row of a block in turn: int32 `[blocks,
    groups, 4 n]`."""
    fours = codes.contiguous().view(torch.int32)
    fours = F.pad(fours, (0, 0, 0, 0, 0, -len(fours) % _ROWS)).unflatten(0, (-1, _ROWS))
    return fours.permute(0, 2, 3, 1).flatten(2)


def _blocks(*parts: Tensor) -> Tensor:
    """What blocks hold of each group `[blocks, groups, ...]`, one after the other: its bytes."""
    fours = [part.flatten().view(torch.int32).view(*part.shape[:2], -1) for part in parts]
    return torch.cat(fours, 2).view(torch.uint8)
