"""What a forward does, written down once: calls of our kernels, and of torch where there is none.

Nothing is computed while a tape runs, but shapes: kernels are noted, and what torch does besides
works on whatever memory holds. `laid_out` in step.py makes the tape into what can be run again.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polyhead.kernels.native import TYPES

aten: Any = torch.ops.aten
Field = Tensor | int | float | None

_FACTORIES = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
_UNARY: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
}
_BINARY: dict[Any, str] = {aten.add.Tensor: "sum", aten.mul.Tensor: "product"}
_COPIES = {aten.clone.default, aten.contiguous.default}


class NotRecordedError(Exception):
    """The forward does what a tape cannot say."""


@dataclass(frozen=True)
class Call:
    """A kernel by its `name` and the fields of its struct, or what to do by torch.

    by: how it is shared among threads; of two calls that are shared alike, the second finds what
    its own thread wrote, unless it `meets` what the others wrote.
    """

    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    name: str = ""
    fields: Sequence[Field] = ()
    by: Hashable = None
    meets: bool = False
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    named: dict[str, Any] | None = None


class Tape(TorchDispatchMode):
    """Notes calls while it is entered.

    `made`: memory that came to be meanwhile, by `storage_of`; everything else was there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.made: set[int] = set()
        self._writes: dict[int, int] = {}
        self._constant: set[int] = set()
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._activated: dict[int, tuple[str, Tensor, tuple[int, ...]]] = {}

    def kernel(
        self,
        name: str,
        kind: torch.dtype,
        fields: Sequence[Field],
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor],
        by: Hashable = None,
        meets: bool = False,
    ) -> None:
        """Note a kernel of step.cpp; fields in the order of its struct."""
        if kind not in TYPES:
            raise NotRecordedError(f"there are no kernels for {kind}")
        given = [x for x in reads if x is not None]
        self._note(Call(given, writes, f"{name}_{TYPES[kind]}", tuple(fields), by, meets))

    def new(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what a kernel writes."""
        return like.new_empty(shape, dtype=dtype or like.dtype)

    def state_of(self, x: Tensor) -> tuple[int, ...]:
        """What tells what a tensor holds now from what it holds after another write."""
        key = storage_of(x)
        return key, self._writes.get(key, 0), x.storage_offset(), *x.shape

    def _note(self, call: Call) -> None:
        for x in call.reads:
            if storage_of(x) in self.made and storage_of(x) not in self._writes:
                raise NotRecordedError("something is read that nothing noted has written")
        for key in {storage_of(x) for x in call.writes}:
            if key in self._constant:
                raise NotRecordedError("what is computed once is written to")
            self._writes[key] = self._writes.get(key, 0) + 1
        self.calls.append(call)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags
        ):
            raise NotRecordedError(f"{func} depends on what is computed")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordedError(f"{func} is drawn")
        named = kwargs or {}
        by_kernel = self._by_kernel(func, args, named)
        if by_kernel is not None:
            return by_kernel
        given = _tensors((args, named))
        found = func(*args, **named)
        outs = _tensors(found)
        if given and not outs and found is not None:
            raise NotRecordedError(f"{func} depends on what is computed")
        known = {storage_of(x) for x in given}
        fresh = [x for x in outs if storage_of(x) not in known]
        self._kept += fresh
        if not fresh and not func._schema.is_mutable:
            return found  # a view
        if not given and fresh:
            # What depends on nothing is computed once, unless it is memory to write to.
            into = self.made if func in _FACTORIES else self._constant
            into |= {storage_of(x) for x in fresh}
            return found
        self.made |= {storage_of(x) for x in fresh}
        if func in _FACTORIES:
            return found
        writes = fresh if not func._schema.is_mutable else outs or list(given[:1])
        self._note(Call(given, writes, function=func, args=args, named=named))
        return found

    def _by_kernel(self, func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        """Note the kernel that does the same, if there is one, without doing it."""
        if func in _UNARY or func is aten.gelu.default:
            how = named.get("approximate", args[1] if len(args) > 1 else "none")
            gelu = "gelu" if how == "none" else "gelu_tanh"
            return self._activation(_UNARY.get(func, gelu), args[0])
        if func in _BINARY and named.get("alpha", 1) == 1 and len(args) == 2:
            return self._binary(_BINARY[func], *args)
        return self._copy(args[0]) if func in _COPIES and not args[1:] else None

    def _activation(self, name: str, x: Tensor) -> Tensor | None:
        if x.dtype not in TYPES or not x.is_contiguous():
            return None
        out = self._new(x, *x.shape)
        tokens, width = _sizes(out)
        self.kernel(name, out.dtype, [x, None, out, tokens, width], [x], [out], tokens)
        self._activated[storage_of(out)] = name, x, self.state_of(x)
        return out

    def _gated(self, a: Any, b: Any) -> Tensor | None:
        """The product of an activation and its gate, in one kernel."""
        if not isinstance(b, Tensor) or storage_of(a) not in self._activated:
            return None
        name, x, state = self._activated[storage_of(a)]
        is_plain = b.is_contiguous() and a.is_contiguous() and a.shape == b.shape
        if not is_plain or a.dtype != b.dtype or state != self.state_of(x):
            return None
        out = self._new(a, *a.shape)
        tokens, width = _sizes(out)
        self.kernel(name, out.dtype, [x, b, out, tokens, width], [x, b], [out], tokens)
        return out

    def _binary(self, name: str, a: Any, b: Any) -> Tensor | None:
        if not isinstance(a, Tensor):
            a, b = b, a
        both = [x for x in (a, b) if isinstance(x, Tensor)]
        if a.dtype not in TYPES or any(x.dtype != a.dtype or x.dim() == 0 for x in both):
            return None
        if name == "product" and (found := self._gated(a, b)) is not None:
            return found
        shape = torch.broadcast_shapes(*(x.shape for x in both))
        width = shape[-1]
        tokens = shape.numel() // max(width, 1)
        left, right = _apart(a, shape), (0, 0)
        number, other = (0.0, b) if isinstance(b, Tensor) else (float(b), None)
        if other is not None:
            right = _apart(other, shape)
        if left is None or right is None:
            return None
        if not left[1] and other is not None:
            a, other, left, right = other, a, right, left
        if not left[1]:
            return None
        out = self._new(a, *shape)
        fields = [a, other, out, tokens, width, left[0], right[0], right[1], number]
        self.kernel(name, out.dtype, fields, [a, other], [out], tokens)
        return out

    def _copy(self, x: Tensor) -> Tensor | None:
        sizes = [(n, step) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1]
        if x.dtype not in TYPES or len(sizes) > 3:
            return None
        sizes = [(1, 0)] * (3 - len(sizes)) + sizes
        (tokens, a), (rows, b), (width, c) = sizes
        out = self._new(x, *x.shape)
        self.kernel("copy", x.dtype, [x, out, tokens, rows, width, a, b, c], [x], [out], tokens)
        return out

    def _new(self, like: Tensor, *shape: int) -> Tensor:
        found = torch.empty(shape, dtype=like.dtype)
        self.made.add(storage_of(found))
        self._kept.append(found)
        return found


def storage_of(x: Tensor) -> int:
    """What tells memory apart; a tensor that hides its own stands for itself."""
    return id(x) if x.is_mkldnn else x.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


def _sizes(out: Tensor) -> tuple[int, int]:
    """Tokens and the width of each."""
    width = out.shape[-1] if out.dim() else 1
    return out.numel() // max(width, 1), width


def _apart(x: Tensor, shape: torch.Size) -> tuple[int, int] | None:
    """How far apart the rows of x stand, spread to a shape, and whether its numbers lie
    side by side rather than being one; None where they lie otherwise."""
    x = x.expand(shape)
    inner = x.stride(-1) if x.shape[-1] > 1 else 1
    outer = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    for (_, before), (n, step) in pairwise(outer):
        if before != n * step:
            return None
    return (outer[-1][1] if outer else 0, inner) if inner in (0, 1) else None
