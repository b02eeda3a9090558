"""Keys and values in blocks of fixed size, wherever there is room (Kwon et al. 2023, section 4).

`G` key/value heads, `D` head width; `B` rows of a step, `T` new tokens of each, `K` keys that they
read; `H` query heads. A slot is the place of one token in one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.generate.pages import NOBODY
from polyhead.kernels.held import Held
from polyhead.nn.attend import attend
from polyhead.nn.cache import Cache, CrossCache
from polyhead.nn.mask import Lowered, Mask

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class Plan:
    """Where the rows of one step write and read, in the pages of layers of one kind."""

    write: Tensor  # [B, G, T] slots
    read: Tensor  # [B * G * blocks] blocks
    shape: tuple[int, int, int]  # B, G, K
    keys_at: Tensor | None  # [B, K] positions of the keys; None: 0, 1, 2 ...
    is_fresh: bool  # nothing is held before the new tokens
    parts: Sequence["Plan"] = ()  # of a step whose rows are the tokens of several plans in turn

    def take(self, other: "Plan") -> None:
        """Be another plan of the same shapes, in the same places."""
        self.write.copy_(other.write)
        self.read.copy_(other.read)
        if self.keys_at is not None and other.keys_at is not None:
            self.keys_at.copy_(other.keys_at)

    @classmethod
    def side_by_side(cls, parts: Sequence["Plan"]) -> "Plan":
        """One plan for the tokens of several: each token is a row, and those of a text follow one
        another. A row's keys are those of its text, and what pads them has position -1."""
        write = torch.cat([part.write.transpose(1, 2).flatten(0, 1) for part in parts])
        longest = max(part.shape[2] for part in parts)
        keys_at = None
        if any(part.keys_at is not None for part in parts):
            keys_at = torch.cat([part._keys_of_tokens(longest) for part in parts])
        shape = len(write), parts[0].shape[1], longest
        return cls(write[:, :, None], parts[0].read[:0], shape, keys_at, False, parts)

    def _keys_of_tokens(self, longest: int) -> Tensor:
        batch, _, many = self.shape
        keys_at = self.keys_at
        if keys_at is None:
            keys_at = torch.arange(many, device=self.write.device).expand(batch, -1)
        keys_at = F.pad(keys_at, (0, longest - many), value=-1)
        return keys_at.repeat_interleave(self.write.shape[2], 0)


class Geometry:
    """Where blocks lie: pages hold all blocks of the first head, then all of the next.

    window: how far back layers of this kind look; None: all the way.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        window: int | None,
        device: torch.device,
    ) -> None:
        self.num_blocks, self.block_size, self.num_heads = num_blocks, block_size, num_heads
        self.window, self.device = window, device
        self._heads = np.arange(num_heads)[:, None] * num_blocks

    def first_block(self, start: int) -> int:
        """The first block that tokens from position `start` on look at."""
        return 0 if self.window is None else max(0, start - self.window + 1) // self.block_size

    def plan(
        self, tables: Numbers, starts: Numbers, counts: Numbers, width: int, fixed: int = 0
    ) -> Plan:
        """For rows with `tables` `[B, blocks]` that hold `starts` tokens and read `counts` more.

        width: T, of which a row's first `counts` are not padding. fixed: whatever they hold, they
        read as many keys as so many tokens need.
        """
        size, batch = self.block_size, len(tables)
        steps = np.arange(width)
        at = starts[:, None] + steps
        block = np.take_along_axis(tables, np.minimum(at // size, tables.shape[1] - 1), axis=1)
        slots = np.where(steps < counts[:, None], block * size + at % size, NOBODY)
        write = slots[:, None] + self._heads * size

        longest = int((starts + counts).max())
        keys_at, is_fresh = None, not fixed and not starts.any()
        if self.window is None and fixed:
            blocks = tables[:, : -(-fixed // size)]
            longest = blocks.shape[1] * size
        elif self.window is None or is_fresh:
            blocks = tables[:, : -(-longest // size)]
        else:
            first = np.array([self.first_block(start) for start in starts.tolist()])
            many = int((-(-(starts + counts) // size) - first).max())
            if fixed:
                many = min(-(-self.window // size) + 1, tables.shape[1])
            which = first[:, None] + np.arange(many)
            blocks = np.take_along_axis(tables, np.minimum(which, tables.shape[1] - 1), axis=1)
            slots_at = (which[:, :, None] * size + np.arange(size)).reshape(batch, -1)
            keys_at = self._tensor(slots_at)
            longest = slots_at.shape[1]
        read = blocks[:, None] + self._heads
        return Plan(
            self._tensor(write), self._tensor(read.reshape(-1)), (batch, self.num_heads, longest),
            keys_at, is_fresh,
        )  # fmt: skip

    def _tensor(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)).to(self.device)


class Pages:
    """One layer's keys, or its values."""

    is_exact = True

    def __init__(self, place: Geometry, head_dim: int, like: Tensor) -> None:
        self.place, self.head_dim = place, head_dim
        rows = place.num_heads * place.num_blocks * place.block_size
        self.held = like.new_zeros(rows, head_dim)

    def write(self, slots: Tensor, x: Tensor) -> None:
        """Put `[B, G, T, D]` into slots `[B, G, T]`."""
        self.held.index_copy_(0, slots.flatten(), x.reshape(-1, self.head_dim))

    def read(self, plan: Plan) -> Tensor:
        """What the rows hold, `[B, G, K, D]`."""
        batch, heads, longest = plan.shape
        found = self._blocks(self.held).index_select(0, plan.read)
        return found.view(batch, heads, -1, self.head_dim)[:, :, :longest]

    def copy(self, source: int, target: int) -> None:
        """Let one block hold what another holds."""
        blocks = self.held.view(self.place.num_heads, self.place.num_blocks, -1)
        blocks[:, target] = blocks[:, source]

    def num_bytes(self) -> int:
        """What they take in memory."""
        return self.held.numel() * self.held.element_size()

    def _blocks(self, x: Tensor) -> Tensor:
        return x.view(self.place.num_heads * self.place.num_blocks, -1)


class HalfPages(Pages):
    """Sixteen bits a number, as IEEE has them; what is too large for them is the largest."""

    is_exact = False

    def __init__(self, place: Geometry, head_dim: int, like: Tensor) -> None:
        super().__init__(place, head_dim, torch.empty(0, dtype=torch.half, device=like.device))
        self.dtype = like.dtype

    def write(self, slots: Tensor, x: Tensor) -> None:
        most = torch.finfo(torch.half).max
        super().write(slots, x.clamp(-most, most).half())

    def read(self, plan: Plan) -> Tensor:
        return super().read(plan).to(self.dtype)


class Int8Pages(Pages):
    """Eight bits a number and a scale a vector: the largest of each is 127."""

    is_exact = False

    def __init__(self, place: Geometry, head_dim: int, like: Tensor) -> None:
        super().__init__(place, head_dim, torch.empty(0, dtype=torch.int8, device=like.device))
        self.scales = like.new_zeros(len(self.held), 1, dtype=torch.float32)
        self.dtype = like.dtype

    def write(self, slots: Tensor, x: Tensor) -> None:
        rows = x.reshape(-1, self.head_dim).float()
        scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.held.index_copy_(0, slots.flatten(), (rows / scales).round().to(torch.int8))
        self.scales.index_copy_(0, slots.flatten(), scales)

    def read(self, plan: Plan) -> Tensor:
        batch, heads, longest = plan.shape
        scales = self._blocks(self.scales).index_select(0, plan.read)
        scales = scales.view(batch, heads, -1, 1)[:, :, :longest]
        return (super().read(plan) * scales).to(self.dtype)

    def num_bytes(self) -> int:
        return super().num_bytes() + self.scales.numel() * self.scales.element_size()

    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        scales = self._blocks(self.scales).unflatten(0, (self.place.num_heads, -1))
        scales[:, target] = scales[:, source]


KINDS = {"model": Pages, "fp16": HalfPages, "int8": Int8Pages}
"""How keys and values are held, by the name of `EngineConfig.kv`."""


class PagedLayer:
    """One layer's pages, read and written where the `plan` of the step says."""

    plan: Plan

    def __init__(self, k: Pages, v: Pages) -> None:
        self.k_pages, self.v_pages = k, v

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put keys and values `[B, G, T, D]` where the plan says."""
        self.k_pages.write(self.plan.write, k)
        self.v_pages.write(self.plan.write, v)

    def read(self, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, K, D]` of the rows of the plan, or of a part of it."""
        plan = plan or self.plan
        return self.k_pages.read(plan), self.v_pages.read(plan)

    def where(self, tables: Numbers) -> Held:
        """Where the rows of these tables lie."""
        place, k, v = self.k_pages.place, self.k_pages, self.v_pages
        of_k, of_v = (x.scales if isinstance(x, Int8Pages) else None for x in (k, v))
        return Held(
            k.held, v.held, of_k, of_v, torch.from_numpy(tables),
            place.block_size, place.num_blocks, place.num_heads, place.window,
        )  # fmt: skip

    def copy(self, source: int, target: int) -> None:
        """Let one block hold what another holds."""
        self.k_pages.copy(source, target)
        self.v_pages.copy(source, target)


class PagedCache(PagedLayer, Cache):
    """One layer's cache of the texts themselves."""

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        self.write(k, v)
        if self.plan.parts or (self.plan.is_fresh and self.k_pages.is_exact):
            return k, v
        return self.read()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Lowered,
        bias: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        if not self.plan.parts:
            return super().attend(q, k, v, mask, bias, scale, dropout)
        found: list[Tensor] = []
        begin = 0
        for part in self.plan.parts:
            batch, many, steps = len(part.write), part.shape[2], part.write.shape[2]
            rows = slice(begin, begin := begin + batch * steps)
            keys, values = self.read(part)
            assert mask.dense is not None
            allowed = Lowered(dense=_of_part(mask.dense, rows, steps)[..., :many])
            added = None if bias is None else _of_part(bias, rows, steps)[..., :many]
            own = _of_part(q, rows, steps)
            seen = attend(own, keys, values, allowed, added, scale, dropout)
            found.append(seen.transpose(1, 2).flatten(0, 1))
        return torch.cat(found)[:, :, None]

    def keys_at(self, at: Tensor) -> Tensor:
        if self.plan.keys_at is not None:
            return self.plan.keys_at
        return torch.arange(self.plan.shape[2], device=at.device)[None]

    def place(self, mask: Mask, at: Tensor) -> Mask:
        if self.plan.keys_at is None:
            return super().place(mask, at)
        return mask.placed(self.lengths, self.plan.keys_at)


def _of_part(x: Tensor, rows: slice, steps: int) -> Tensor:
    """Of rows of one token each `[N|1, H, 1, ...]`, those of a part by text, `[B, H, T, ...]`."""
    own = x[rows] if len(x) > 1 else x.expand(rows.stop - rows.start, *x.shape[1:])
    return own[:, :, 0].unflatten(0, (-1, steps)).transpose(1, 2)


class PagedCross(PagedLayer, CrossCache):
    """One layer's cache of sources, written once.

    What the rows of a step read is put together when they change, not at each step.
    """

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.write(k, v)
        self.held = (k, v) if self.k_pages.is_exact else self.read()
        return self.held
