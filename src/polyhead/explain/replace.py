"""What a running model computes inside, replaced from outside."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.explain.look import Look, Named, check_runs, counted
from polyhead.explain.places import attention_at, chosen, kind_of
from polyhead.nn.attention import MultiHeadAttention

Change = Callable[[Tensor], Tensor]
Heads = Sequence[tuple[int | str, int]]
"""Heads by their attention's name, or its number among all attentions, and their own number."""


@contextmanager
def replace(
    model: nn.Module, where: str, what: str, by: Tensor | Mapping[str, Tensor] | Change
) -> Generator[None]:
    """Let the layers named go on with something else than what they computed.

    where, what: as of `capture`, and of the same shapes. by: what takes its place, broadcast to its
    shape; or by name for each place, as `capture` gave it of another run; or a function of what was
    computed. Raises ConfigError where nothing has such a name, and where a shape does not fit.
    """
    if what == "logits":
        raise ConfigError("logits of a layer are read by nothing after it; replace its residual")
    owners = chosen(model, where, what)
    if isinstance(by, Mapping) and not any(_place(name) in owners for name in by):
        raise ConfigError(
            f"by names {', '.join(by) or 'nothing'}, and {where!r} means {', '.join(owners)}: "
            "capture and replace the same places"
        )
    looks: list[Named] = []
    with ExitStack() as stack:
        runs = stack.enter_context(counted(model, list(owners)))
        for place in owners:
            look = _Replace(Named(runs, what, place, where), by)
            looks.append(look.named)
            stack.callback(kind_of(what).take(model, place, look))
        yield
        check_runs(looks)


@contextmanager
def knock_out(model: nn.Module, heads: Heads) -> Generator[None]:
    """Let some heads find nothing: what they would add is zero.

    heads: such as `[(3, 0), ("decoder.layers.1.cross", 5)]`. A layer that serves several depths, as
    ALBERT's, loses the head at all of them, or by `...attention@1` at one.
    """
    by_place: dict[str, list[int]] = {}
    for layer, head in heads:
        place = attention_at(model, layer)
        count = _attention(model, _place(place)).num_heads
        if not 0 <= head < count:
            raise ConfigError(f"head {head} of {place}, which has {count}; count from 0")
        by_place.setdefault(place, []).append(head)
    with ExitStack() as stack:
        for place, numbers in by_place.items():
            stack.enter_context(replace(model, place, "heads", without(numbers, 1)))
        yield


def without(numbers: Sequence[int], dim: int = -1) -> Change:
    """A change that sets some entries of a dimension to zero: heads of 1, neurons of the last."""
    return scaled(numbers, 0.0, dim)


def scaled(numbers: Sequence[int], factor: float, dim: int = -1) -> Change:
    """A change that multiplies some entries of a dimension: heads of 1, neurons of the last."""

    def change(x: Tensor) -> Tensor:
        if not all(-x.shape[dim] <= number < x.shape[dim] for number in numbers):
            raise ConfigError(f"numbers {list(numbers)} of {x.shape[dim]}; count from 0")
        factors = x.new_ones(x.shape[dim])
        factors[list(numbers)] = factor
        return x * factors.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))

    return change


def steered(vector: Tensor, factor: float = 1.0) -> Change:
    """A change that adds a vector `[E]` to every token, as to the residual stream."""
    return lambda x: x + factor * vector.to(x)


class _Replace(Look):
    def __init__(self, named: Named, by: Tensor | Mapping[str, Tensor] | Change) -> None:
        self.named, self.by = named, by

    def __call__(self, x: Tensor) -> Tensor | None:
        name = self.named()
        if name is None:
            return None
        found = self._found(name, x)
        if found is None:
            return None
        try:
            return found.to(x).broadcast_to(x.shape)
        except RuntimeError:
            raise ConfigError(
                f"the {self.named.what} of {name} are {list(x.shape)}, and what is to replace them "
                f"is {list(found.shape)}"
            ) from None

    def _found(self, name: str, x: Tensor) -> Tensor | None:
        if isinstance(self.by, Mapping):
            return self.by.get(name)
        return self.by if isinstance(self.by, Tensor) else self.by(x)


def _place(name: str) -> str:
    return name.partition("@")[0]


def _attention(model: nn.Module, place: str) -> MultiHeadAttention:
    part = model.get_submodule(place)
    assert isinstance(part, MultiHeadAttention)
    return part
