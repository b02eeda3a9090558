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
_SIGHT = 16  # calls that may change places
_REST = 16  # calls for which memory rests before it is used again, so that none waits for it


class _Part(ctypes.Structure):
    """`Part` of step.cpp."""

    _fields_ = (
        ("run", ctypes.c_void_p), ("fields", ctypes.c_void_p), ("apart", ctypes.c_int64),
        ("waits", ctypes.c_int64), ("alone", ctypes.c_int64), ("ahead", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )  # fmt: skip


class Step:
    """A tape whose `outputs` a call computes from what its inputs hold then.

    Inputs, weights and whatever else was there before the tape is read and written where it lies.
    It keeps to as many threads as torch had when the tape ran.
    """

    def __init__(self, tape: Tape, outputs: Sequence[Tensor]) -> None:
        calls = _needed(tape, outputs)
        self._threads = torch.get_num_threads()
        own = _own(tape, calls, outputs, self._threads)
        calls = _ordered(calls, own)
        self._room = _Room(tape, calls, outputs, own, self._threads)
        self.outputs = [self._room.place(x) for x in outputs]
        used = (x for call in calls for x in (*call.reads, *call.writes))
        # What the tape made is freed with it: here it lies elsewhere.
        # A weight may be given other memory before this is forgotten.
        self._held: list[Any] = [x.detach() for x in used if storage_of(x) not in tape.made]
        self._run: list[Callable[[], None]] = []
        kernels: list[tuple[Call, bool]] = []
        waits = _Waits(own, self._room.key)
        for call in calls:
            if call.function is None:
                kernels.append((call, waits.before(call)))
                continue
            self._add(kernels)
            kernels, waits = [], _Waits(own, self._room.key)
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
        streams: Tensor | None = None
        for part, (call, waits) in zip(parts[::-1], kernels[::-1], strict=True):
            self._fill(part, call)
            part.run = ctypes.cast(getattr(native, call.name), ctypes.c_void_p)
            part.waits = waits
            if call.streams is not None:
                streams = call.streams
            if streams is not None:
                part.ahead, part.bytes = streams.data_ptr(), streams.nbytes

        count, threads = ctypes.c_int64(len(parts)), ctypes.c_int32(self._threads)

        def run() -> None:
            native.step(parts, count, threads)

        self._run.append(run)

    def _fill(self, part: _Part, call: Call) -> None:
        """The fields of a part, one thread's after another's where some of it is each one's own."""
        of_each = [
            _packed([self._field(field, thread) for field in call.fields])
            for thread in range(self._threads)
        ]
        fields = ctypes.create_string_buffer(b"".join(of_each))
        self._held.append(fields)
        part.fields, part.apart = ctypes.addressof(fields), len(of_each[0])
        part.alone = any(self._room.is_own(x) for x in call.writes)

    def _field(self, field: Field, thread: int) -> int | float:
        if isinstance(field, Tensor):
            return self._room.place(field, thread).data_ptr()
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


def _own(tape: Tape, calls: Sequence[Call], outputs: Sequence[Tensor], threads: int) -> set[int]:
    """What every thread had better compute for itself than wait for another: of fewer tokens than
    there are threads."""
    shared = {storage_of(x) for x in outputs}
    for call in calls:
        is_small = isinstance(call.by, int) and call.by < threads and call.function is None
        into = {storage_of(x) for x in call.writes}
        if not is_small or not into <= tape.made:
            shared |= into
    found = {storage_of(x) for call in calls for x in call.writes} - shared
    # A call writes its own alone, or nothing of them.
    for call in calls:
        into = {storage_of(x) for x in call.writes}
        if not into <= found:
            found -= into
    return found


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
        self._own = own
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

    def is_own(self, x: Tensor) -> bool:
        """Whether each thread has its own."""
        return storage_of(x) in self._own

    def key(self, x: Tensor) -> Hashable:
        """What tells the memory of one tensor from that of others."""
        key = storage_of(x)
        return self._slot.get(key, ("before", key))

    def place(self, x: Tensor, thread: int = 0) -> Tensor:
        """A tensor of the tape where it lies here, a thread's where each has its own."""
        slot = None if x.is_mkldnn else self._slot.get(storage_of(x))
        if slot is None:
            return x
        size = x.element_size()
        start = self._starts[slot] + thread * self._apart[slot] * self._is_own[slot]
        offset = start // size + x.storage_offset()
        return torch.empty(0, dtype=x.dtype).set_(self._storage, offset, x.shape, x.stride())


class _Waits:
    """Which calls must wait for all threads: those that meet what another thread wrote or read.

    key: what tells the memory of a tensor from that of others.
    """

    def __init__(self, own: set[int], key: Callable[[Tensor], Hashable]) -> None:
        self._own, self._key = own, key
        self._forget()

    def _forget(self) -> None:
        self._readers: dict[Hashable, set[tuple[Hashable, int]]] = {}
        self._writers: dict[Hashable, set[tuple[Hashable, int]]] = {}

    def must(self, call: Call) -> bool:
        """Whether a call would have to, the next of a row."""
        alone = self._is_alone(call)
        return any(
            # Of a tensor that two calls share alike, a thread finds its own part.
            by is None or alone or call.meets or (by, tensor) != (call.by, storage_of(x))
            for x in (*call.reads, *call.writes)
            for by, tensor in self._met(x, any(x is y for y in call.writes))
        )

    def before(self, call: Call) -> bool:
        """The same, and the call is made."""
        if waits := self.must(call):
            self._forget()
        by = None if self._is_alone(call) else call.by
        for tensors, into in ((call.reads, self._readers), (call.writes, self._writers)):
            for x in tensors:
                if storage_of(x) not in self._own:
                    into.setdefault(self._key(x), set()).add((by, storage_of(x)))
        return waits

    def _is_alone(self, call: Call) -> bool:
        return any(storage_of(x) in self._own for x in call.writes)

    def _met(self, x: Tensor, is_written: bool) -> set[tuple[Hashable, int]]:
        key = self._key(x)
        writers = self._writers.get(key, set())
        return writers | self._readers.get(key, set()) if is_written else writers


def _ordered(calls: Sequence[Call], own: set[int]) -> list[Call]:
    """The calls in an order that waits less: what need not wait goes before what must."""
    found: list[Call] = []
    waits = _Waits(own, storage_of)
    left = list(enumerate(calls))
    needs = _needs(calls)
    done: set[int] = set()
    while left:
        ready = [
            (place, number)
            for place, (number, call) in enumerate(left[:_SIGHT])
            if needs[number] <= done and (call.function is None or place == 0)
        ]
        first_by_torch = next(
            (place for place, (_, call) in enumerate(left[:_SIGHT]) if call.function), _SIGHT
        )
        ready = [each for each in ready if each[0] <= first_by_torch]
        place, number = next((r for r in ready if not waits.must(calls[r[1]])), ready[0])
        del left[place]
        done.add(number)
        found.append(calls[number])
        waits.before(calls[number])
    return found


def _needs(calls: Sequence[Call]) -> list[set[int]]:
    """Of each call, those before it that it must not overtake."""
    writer: dict[int, int] = {}
    readers: dict[int, set[int]] = {}
    found: list[set[int]] = []
    for number, call in enumerate(calls):
        into = {storage_of(x) for x in call.writes}
        before = {writer[key] for x in call.reads if (key := storage_of(x)) in writer}
        for key in into:
            before |= readers.get(key, set()) | ({writer[key]} if key in writer else set())
        for x in call.reads:
            readers.setdefault(storage_of(x), set()).add(number)
        for key in into:
            writer[key], readers[key] = number, set()
        found.append(before - {number})
    return found


def _packed(fields: Sequence[int | float]) -> ctypes.Array[ctypes.c_char]:
    """Fields of eight bytes each, whole numbers and floats as C has them."""
    form = "".join("d" if isinstance(field, float) else "q" for field in fields)
    try:
        return ctypes.create_string_buffer(struct.pack(f"={form}", *fields))
    except struct.error as error:
        raise NotRecordedError(f"fields do not fit: {error}") from None
