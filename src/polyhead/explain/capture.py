"""What a running model computes inside, captured from outside."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from polyhead.explain.look import Look, Named, check_runs, counted
from polyhead.explain.places import chosen, kind_of, kinds_of
from polyhead.explain.reduce import Kept, Reduce, Reduction, check_fit, reduction
from polyhead.explain.room import require_room

_LITTLE = 2**28  # bytes that are kept unasked

Seen = dict[str, Any]
"""What was kept, by the name of its place."""
Note = Callable[[str, str, Kept], None]
"""Takes what was seen, its place, and what is kept of it."""


@contextmanager
def capture(
    model: nn.Module,
    where: str = "*",
    what: str | Sequence[str] = "weights",
    reduce: str | Reduce | None = None,
    *,
    graph: bool = False,
) -> Generator[Seen]:
    """What the layers named compute in the forwards run inside, by their names; the last of each.

    where:  a part of a name, whole between dots (`layers.3`, `cross`), or a pattern
            (`*.layers.[0-3].attention`).
    what:   of `KINDS`: weights or scores `[B, H, Q, K]`, queries, heads `[B, H, T, D]`, keys,
            values `[B, G, K, D]`, attention_out, ffn_out, residual, residual_in `[B, T, E]`,
            neurons `[B, T, F]`, routing `[B, T, N]`, logits `[B, T, V]`: what the head would say
            of the stream after a block. Of several, `seen[what][name]`.
    reduce: what is kept: "mean" of the heads, "entropy", what each key "received", "top-5"; or a
            function. By name, weights are computed some queries at a time, so that long texts fit.
    graph:  keep what gradients need.

    A layer that serves several depths, as ALBERT's, has a name for each: `...attention`,
    `...attention@1` and so on. Layers not named stay on the fused path; answers are the same to
    rounding. In steps over a rolling cache the keys are its slots, in the order of the ring. The
    model is seen by one thread at a time: forwards of others are seen, too. Raises ConfigError
    where nothing has such a name, what is kept would not fit, or blocks are recomputed.
    """
    several = not isinstance(what, str)
    seen: Seen = {one: {} for one in kinds_of(what)} if several else {}

    def note(one: str, name: str, kept: Kept) -> None:
        (seen[one] if several else seen)[name] = kept

    with _captured(model, where, what, reduce, graph, note):
        yield seen


@contextmanager
def capture_steps(
    model: nn.Module,
    where: str = "*",
    what: str | Sequence[str] = "weights",
    reduce: str | Reduce | None = None,
) -> Generator[list[Seen]]:
    """What `capture` gives, for every forward run inside: for each step of a generation.

    A step ends where a place comes to run again; the arguments are those of `capture`.
    """
    several, kinds = not isinstance(what, str), kinds_of(what)
    steps: list[Seen] = []
    now: set[tuple[str, str]] = set()

    def note(one: str, name: str, kept: Kept) -> None:
        if not steps or (one, name) in now:
            steps.append({each: {} for each in kinds} if several else {})
            now.clear()
        now.add((one, name))
        (steps[-1][one] if several else steps[-1])[name] = kept

    with _captured(model, where, what, reduce, False, note):
        yield steps


@contextmanager
def _captured(
    model: nn.Module,
    where: str,
    what: str | Sequence[str],
    reduce: str | Reduce | None,
    graph: bool,
    note: Note,
) -> Generator[None]:
    how = reduction(reduce)
    kinds = kinds_of(what)
    for one in kinds:
        check_fit(one, reduce)
    owners = {one: list(chosen(model, where, one)) for one in kinds}
    looks: list[Named] = []
    with ExitStack() as stack:
        runs = stack.enter_context(counted(model, [*chain.from_iterable(owners.values())]))
        for one, places in owners.items():
            room = _Room(one, len(places))
            for place in places:
                look = _Keep(Named(runs, one, place, where), how, graph, note, room)
                looks.append(look.named)
                stack.callback(kind_of(one).take(model, place, look))
        yield
        check_runs(looks)


class _Room:
    """Counts what is still to be kept, so that what would not fit is refused and not tried."""

    def __init__(self, what: str, places: int) -> None:
        self.what, self.places, self.left = what, places, places

    def take(self, kept: Kept) -> None:
        """Raise ConfigError where the rest, of the size of this, does not fit."""
        sizes = [
            x.numel() * x.element_size() for x in ([kept] if isinstance(kept, Tensor) else kept)
        ]
        self.left = max(1, self.left - 1)
        need = sum(sizes) * self.left
        if need > _LITTLE:
            device = (kept if isinstance(kept, Tensor) else kept[0]).device
            require_room(need, device, f"keeping the {self.what} of {self.places} places")


class _Keep(Look):
    def __init__(
        self, named: Named, how: Reduce | None, graph: bool, note: Note, room: _Room
    ) -> None:
        self.named, self.how, self.graph, self.note, self.room = named, how, graph, note, room
        self.only_looks = not graph
        self.reduction = how if isinstance(how, Reduction) and not graph else None

    def __call__(self, x: Tensor) -> None:
        name = self.named()
        if name is None:
            return
        x = x if self.graph else x.detach()
        if self.how is not None:
            self._keep(name, self.how(x))
        else:
            # What lies in a cache is overwritten later.
            self._keep(name, x.clone() if self.named.what in ("keys", "values") else x)

    def keep(self, kept: Kept) -> None:
        name = self.named()
        if name is not None:
            self._keep(name, kept)

    def _keep(self, name: str, kept: Kept) -> None:
        self.room.take(kept)
        self.note(self.named.what, name, kept)
