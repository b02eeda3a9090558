"""A tape as one call: what is needed of it, in memory of its own, and run again and again."""

import ctypes
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.kernels.native import library
from polyhead.kernels.tape import Call, Field, NotRecordedError, Tape, storage_of

_ALIGNED = 64  # bytes


class _Part(ctypes.Structure):
    """`Part` of step.cpp."""

    _fields_ = (("run", ctypes.c_void_p), ("fields", ctypes.c_void_p), ("waits", ctypes.c_int64))


class Step:
    """A tape whose `outputs` a call computes from what its inputs hold then.

    Inputs, weights and whatever else was there before the tape is read and written where it lies.
    It keeps to as many threads as torch had when the tape ran.
    """

    def __init__(self, tape: Tape, outputs: Sequence[Tensor]) -> None:
        calls = _needed(tape, outputs)
        self._room = _Room(tape, calls, outputs)
        self.outputs = [self._room.place(x) for x in outputs]
        used = (x for call in calls for x in (*call.reads, *call.writes))
        # What the tape made is freed with it: here it lies elsewhere.
        # A weight may be given other memory before this is forgotten.
        self._held: list[Any] = [x.detach() for x in used if storage_of(x) not in tape.made]
        self._run: list[Callable[[], None]] = []
        self._threads = ctypes.c_int32(torch.get_num_threads())
        kernels: list[tuple[Call, bool]] = []
        waits = _Waits(self._room)
        for call in calls:
            if call.function is None:
                kernels.append((call, waits.before(call)))
                continue
            self._add(kernels)
            kernels, waits = [], _Waits(self._room)
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
            fields = _packed([self._field(field) for field in call.fields])
            self._held.append(fields)
            part.run = ctypes.cast(getattr(native, call.name), ctypes.c_void_p)
            part.fields = ctypes.addressof(fields)
            part.waits = waits

        count = ctypes.c_int64(len(parts))

        def run() -> None:
            native.step(parts, count, self._threads)

        self._run.append(run)

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
    """Memory for what a tape makes; what is no longer read makes room for what comes."""

    def __init__(self, tape: Tape, calls: Sequence[Call], outputs: Sequence[Tensor]) -> None:
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
        free: list[int] = []
        for number, call in enumerate(calls):
            for x in call.writes:
                if (key := storage_of(x)) in sizes and key not in self._slot:
                    self._slot[key] = self._take(free, sizes[key])
            ends = {storage_of(x) for x in (*call.reads, *call.writes)}
            free += [self._slot[key] for key in ends if key in sizes and last[key] == number]
        starts = [0]
        for size in self._sizes:
            starts.append(starts[-1] + -(-size // _ALIGNED) * _ALIGNED)
        room = torch.empty(starts[-1] + _ALIGNED, dtype=torch.uint8)
        first = -room.data_ptr() % _ALIGNED
        self._starts = [first + start for start in starts]
        self._storage = room.untyped_storage()

    def _take(self, free: list[int], size: int) -> int:
        fitting = [slot for slot in free if self._sizes[slot] >= size]
        if fitting:
            slot = min(fitting, key=lambda slot: self._sizes[slot])
            free.remove(slot)
            return slot
        self._sizes.append(size)
        return len(self._sizes) - 1

    def key(self, x: Tensor) -> Hashable:
        """What tells the memory of one tensor from that of others."""
        key = storage_of(x)
        return self._slot.get(key, ("before", key))

    def place(self, x: Tensor) -> Tensor:
        """A tensor of the tape where it lies here."""
        slot = None if x.is_mkldnn else self._slot.get(storage_of(x))
        if slot is None:
            return x
        size = x.element_size()
        offset = self._starts[slot] // size + x.storage_offset()
        return torch.empty(0, dtype=x.dtype).set_(self._storage, offset, x.shape, x.stride())


class _Waits:
    """Which calls must wait for all threads: those that meet what another thread wrote or read."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._readers: dict[Hashable, set[tuple[Hashable, int]]] = {}
        self._writers: dict[Hashable, set[tuple[Hashable, int]]] = {}

    def before(self, call: Call) -> bool:
        """Whether this one must, the next of a row."""
        waits = any(
            # Of a tensor that two calls share alike, a thread finds its own part.
            by is None or call.meets or (by, tensor) != (call.by, storage_of(x))
            for x in (*call.reads, *call.writes)
            for by, tensor in self._met(x, any(x is y for y in call.writes))
        )
        if waits:
            self._readers, self._writers = {}, {}
        for tensors, into in ((call.reads, self._readers), (call.writes, self._writers)):
            for x in tensors:
                into.setdefault(self._room.key(x), set()).add((call.by, storage_of(x)))
        return waits

    def _met(self, x: Tensor, is_written: bool) -> set[tuple[Hashable, int]]:
        key = self._room.key(x)
        writers = self._writers.get(key, set())
        return writers | self._readers.get(key, set()) if is_written else writers


def _packed(fields: Sequence[int | float]) -> ctypes.Array[ctypes.c_char]:
    """Fields of eight bytes each, whole numbers and floats as C has them."""
    form = "".join("d" if isinstance(field, float) else "q" for field in fields)
    try:
        return ctypes.create_string_buffer(struct.pack(f"={form}", *fields))
    except struct.error as error:
        raise NotRecordedError(f"fields do not fit: {error}") from None
