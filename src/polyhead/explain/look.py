"""A look at one place of a running model, and the count of how often each place has run."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.explain.reduce import Kept, Reduction
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.patches import PatchEmbedding


class Look:
    """Called with what is seen; what it returns, if anything, takes the place of that.

    only_looks: it never returns anything, so that weights may be made some queries at a time.
    reduction:  what of them is asked for, if that is made of some queries at a time, too.
    """

    only_looks = False
    reduction: Reduction | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        raise NotImplementedError

    def keep(self, kept: Kept) -> None:
        """Take what `reduction` has left."""
        raise NotImplementedError


Runs = Counter[tuple[str, str]]
"""How often what is seen of a place, `(what, place)`, has run in the forward at hand."""


class Named:
    """Names the runs of a place: the first by the place, a later one `place@1`.

    Layers that serve several depths, as ALBERT's do, run several times a forward. where: of the
    form `...@1` it wants that run alone.
    """

    def __init__(self, runs: Runs, what: str, place: str, where: str = "") -> None:
        self.runs, self.what, self.place = runs, what, place
        self.wanted = where.partition("@")[2]
        self.most, self.is_found = 0, False

    def __call__(self) -> str | None:
        """The name of the run that is on; None where it is not wanted."""
        if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportPrivateUsage]
            raise ConfigError(
                f"{self.place} is recomputed on the way back, where its runs cannot be told apart; "
                "capture and replace without recomputing"
            )
        count = self.runs[self.what, self.place]
        self.runs[self.what, self.place] += 1
        self.most = max(self.most, count + 1)
        if self.wanted and not fnmatchcase(str(count), self.wanted):
            return None
        self.is_found = True
        return f"{self.place}@{count}" if count else self.place


def check_runs(names: Sequence[Named]) -> None:
    """ConfigError where a run was wanted, forwards were run, and none of them had it."""
    ran = [name for name in names if name.most]
    if ran and not any(name.is_found for name in ran):
        first = ran[0]
        raise ConfigError(
            f"there was no run {first.wanted!r} of {first.place}, which runs {first.most} times a "
            f"forward; name one from 0 to {first.most - 1} after the @"
        )


@contextmanager
def counted(model: nn.Module, places: Sequence[str]) -> Generator[Runs]:
    """The runs of these places, counted anew in each forward inside.

    One begins when a module does that holds a stack of layers, or when tokens or patches are
    embedded for it.
    """
    runs: Runs = Counter()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(_forget(runs, stack))
        for name, stack in _beginnings(model, places).items()
    ]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def _forget(runs: Runs, stack: str) -> Callable[[nn.Module, object], None]:
    begin = f"{stack}." if stack else ""

    def forget(_: nn.Module, __: object) -> None:
        for key in [key for key in runs if key[1].startswith(begin)]:
            del runs[key]

    return forget


def _beginnings(model: nn.Module, places: Sequence[str]) -> dict[str, str]:
    """Modules with which a forward begins, by name, and what holds the layers that then run."""
    found: dict[str, str] = {}
    for stack in dict.fromkeys(stack for place in places for stack in _stacks(model, place)):
        found[stack] = stack
        for name, child in model.get_submodule(stack).named_children():
            if isinstance(child, TokenEmbedding | PatchEmbedding):
                found[f"{stack}.{name}".strip(".")] = stack
    return found


def _stacks(model: nn.Module, place: str) -> Iterator[str]:
    """What a place lies in, from outside, up to the first list of layers."""
    parts = place.split(".")
    for count in range(len(parts)):
        name = ".".join(parts[:count])
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return
        yield name
