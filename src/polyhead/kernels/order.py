"""In which order the calls of a step are made, and which of them wait for all threads."""

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from polyhead.kernels.tape import Call, Tape, storage_of

_SIGHT = 16  # calls that may change places


def own_of(tape: Tape, calls: Sequence[Call], outputs: Sequence[Tensor], threads: int) -> set[int]:
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


class Waits:
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


def ordered(calls: Sequence[Call], own: set[int]) -> list[Call]:
    """The calls in an order that waits less: what need not wait goes before what must."""
    found: list[Call] = []
    waits, needs = Waits(own, storage_of), _needs(calls)
    left, done = list(range(len(calls))), set[int]()
    while left:
        ready = [number for number in _in_sight(calls, left) if needs[number] <= done]
        number = next((n for n in ready if not waits.must(calls[n])), ready[0])
        left.remove(number)
        done.add(number)
        found.append(calls[number])
        waits.before(calls[number])
    return found


def _in_sight(calls: Sequence[Call], left: Sequence[int]) -> Sequence[int]:
    """Those that may be next: kernels before the next call by torch, which keeps its place."""
    for place, number in enumerate(left[:_SIGHT]):
        if calls[number].function is not None:
            return left[: max(place, 1)]
    return left[:_SIGHT]


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
