"""A tape as one call: what is needed of it, in memory of its own, and run again and again."""

import ctypes
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.kernels.native import library
from polyhead.kernels.order import Waits, ordered, own_of
from polyhead.kernels.tape import Call, Field, NotRecordedError, Tape, storage_of

_ALIGNED = 64  # bytes
_REST = 16  # calls for which memory rests before it is used again, so that none waits for it


class _Part(ctypes.Structure):
    """`Part` of step.cpp."""

    _fields_ = (
        ("run", ctypes.c_void_p), ("fields", ctypes.c_void_p), ("apart", ctypes.c_int64),
        ("waits", ctypes.c_int64), ("alone", ctypes.c_int64),
    )  # fmt: skip


class Step:
    """A tape whose `outputs` a call computes from what its inputs hold then.

    Inputs, weights and whatever else was there before the tape is read and written where it lies.
    It keeps to as many threads as torch had when the tape ran.
    """

    def __init__(self, tape: Tape, outputs: Sequence[Tensor]) -> None:
        calls = _needed(tape, outputs)
        self._threads = torch.get_num_threads()
        own = own_of(tape, calls, outputs, self._threads)
        calls = ordered(calls, own)
        self._room = _Room(tape, calls, outputs, own, self._threads)
        self.outputs = [self._room.place(x) for x in outputs]
        used = (x for call in calls for x in (*call.reads, *call.writes))
        # What the tape made is freed with it: here it lies elsewhere.
        # A weight may be given other memory before this is forgotten.
        self._held: list[Any] = [x.detach() for x in used if storage_of(x) not in tape.made]
        self._run: list[Callable[[], None]] = []
        kernels: list[tuple[Call, bool]] = []
        waits = Waits(own, self._room.key)
        for call in calls:
            if call.function is None:
                kernels.append((call, waits.before(call)))
                continue
            self._add(kernels)
            kernels, waits = [], Waits(own, self._room.key)
            self._run.append(self._by_torch(call))
        self._add(kernels)

    def __call__(self) -> None:
        for run in self._run:
            run()

    def _add(self, kernels: Sequence[tuple[Call, bool]]) -> None:
        """One call for kernels that follow each other."""
        if not kernels:
            return
        native: Any = library("step")
        parts = (_Part * len(kernels))()
        for part, (call, waits) in zip(parts, kernels, strict=True):
            self._fill(part, call)
            part.run = ctypes.cast(getattr(native, call.name), ctypes.c_void_p)
            part.waits = waits

        count, threads = ctypes.c_int64(len(parts)), ctypes.c_int32(self._threads)

        def run() -> None:
            native.step(parts, count, threads)

        self._run.append(run)

    def _fill(self, part: _Part, call: Call) -> None:
        """The fields of a part: one thread's after another's, where each has some for itself."""
        apart = [self._room.apart(x) if isinstance(x, Tensor) else 0 for x in call.fields]
        first = [self._field(field) for field in call.fields]
        of_each = [_packed(first)]
        if any(apart):
            for thread in range(1, self._threads):
                fields = [
                    x + thread * step if step else x for x, step in zip(first, apart, strict=True)
                ]
                of_each.append(_packed(fields))
        fields = ctypes.create_string_buffer(b"".join(of_each))
        self._held.append(fields)
        part.fields = ctypes.addressof(fields)
        part.apart = len(of_each[0]) if any(apart) else 0
        part.alone = any(self._room.apart(x) for x in call.writes)

    def _field(self, field: Field) -> int | float:
        if isinstance(field, Tensor):
            return self._room.place(field).data_ptr()
        return 0 if field is None else field

    def _by_torch(self, call: Call) -> Callable[[], None]:
        function, place = call.function, self._room.place
        assert function is not None
        args, named = torch.utils._pytree.tree_map_only(Tensor, place, (call.args, call.named))
        into = [place(x) for x in call.writes]
        is_in_place = function._schema.is_mutable  # pyright: ignore[reportFunctionMemberAccess]

        def run() -> None:
            found = function(*args, **named)
            if not is_in_place:
                found = [found] if isinstance(found, Tensor) else found
                for x, y in zip(into, found, strict=True):
                    x.copy_(y)

        return run


def _needed(tape: Tape, outputs: Sequence[Tensor]) -> list[Call]:
    """The calls that outputs, or what was there before, come from."""
    wanted = {storage_of(x) for x in outputs}
    found: list[Call] = []
    for call in reversed(tape.calls):
        into = {storage_of(x) for x in call.writes}
        if into & wanted or not into <= tape.made:
            wanted |= {storage_of(x) for x in call.reads}
            found.append(call)
    return found[::-1]


class _Room:
    """Memory for what a tape makes; what is no longer read makes room for what comes.

    own: what each thread has for itself.
    """

    def __init__(
        self,
        tape: Tape,
        calls: Sequence[Call],
        outputs: Sequence[Tensor],
        own: set[int],
        threads: int,
    ) -> None:
        last: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for number, call in enumerate(calls):
            for x in (*call.reads, *call.writes):
                if storage_of(x) in tape.made:
                    last[storage_of(x)] = number
                    sizes[storage_of(x)] = x.untyped_storage().nbytes()
        for x in outputs:
            last[storage_of(x)] = len(calls)
        self._slot: dict[int, int] = {}
        self._sizes: list[int] = []
        self._is_own: list[bool] = []
        self._apart: list[int] = []  # one thread's from the next one's
        free: list[tuple[int, int]] = []  # slots, and since which call
        for number, call in enumerate(calls):
            for x in call.writes:
                if (key := storage_of(x)) in sizes and key not in self._slot:
                    self._slot[key] = self._take(free, number, sizes[key], key in own)
            ends = {storage_of(x) for x in (*call.reads, *call.writes)}
            free += [
                (self._slot[key], number) for key in ends if key in sizes and last[key] == number
            ]
        starts = [0]
        for size, is_own in zip(self._sizes, self._is_own, strict=True):
            self._apart.append(-(-size // _ALIGNED) * _ALIGNED)
            starts.append(starts[-1] + self._apart[-1] * (threads if is_own else 1))
        room = torch.empty(starts[-1] + _ALIGNED, dtype=torch.uint8)
        first = -room.data_ptr() % _ALIGNED
        self._starts = [first + start for start in starts]
        self._storage = room.untyped_storage()

    def _take(self, free: list[tuple[int, int]], number: int, size: int, is_own: bool) -> int:
        for place, (slot, since) in enumerate(free):
            fits = size <= self._sizes[slot] <= 2 * size and self._is_own[slot] == is_own
            if fits and number - since >= _REST:
                del free[place]
                return slot
        self._sizes.append(size)
        self._is_own.append(is_own)
        return len(self._sizes) - 1

    def key(self, x: Tensor) -> Hashable:
        """What tells the memory of one tensor from that of others."""
        key = storage_of(x)
        return self._slot.get(key, ("before", key))

    def place(self, x: Tensor) -> Tensor:
        """A tensor of the tape where it lies here, the first thread's where each has its own."""
        slot = None if x.is_mkldnn else self._slot.get(storage_of(x))
        if slot is None:
            return x
        size = x.element_size()
        offset = self._starts[slot] // size + x.storage_offset()
        return torch.empty(0, dtype=x.dtype).set_(self._storage, offset, x.shape, x.stride())

    def apart(self, x: Tensor) -> int:
        """Bytes from one thread's to the next one's; 0 where they share it."""
        slot = self._slot.get(storage_of(x))
        return self._apart[slot] if slot is not None and self._is_own[slot] else 0


def _packed(fields: Sequence[int | float]) -> bytes:
    """Fields of eight bytes each, whole numbers and floats as C has them."""
    form = "".join("d" if isinstance(field, float) else "q" for field in fields)
    try:
        return struct.pack(f"={form}", *fields)
    except struct.error as error:
        raise NotRecordedError(f"fields do not fit: {error}") from None
