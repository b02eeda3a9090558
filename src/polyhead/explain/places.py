"""What can be seen of a running model, where, and by what names.

B batch, T tokens, H heads, G key/value heads, D their width, E the model's, F neurons, N experts,
V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.explain.answers import Answers, stack_of
from polyhead.explain.attention import STAGES, look_into
from polyhead.explain.look import Look
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.head import Head
from polyhead.nn.moe import MixtureOfExperts

Remove = Callable[[], None]


@dataclass(frozen=True)
class Kind:
    """One thing to be seen: whose it is, and how a look is taken at one of these."""

    owner: str
    owners: Callable[[nn.Module], dict[str, nn.Module]]
    take: Callable[[nn.Module, str, Look], Remove]


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of attention by name, as they run."""
    return _of_type(model, MultiHeadAttention)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by name: what holds an attention, and has the residual stream pass through it."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in attentions(model) if "." in name)
    return {name: model.get_submodule(name) for name in names}


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    """Feed-forward layers by name, the shared ones of mixtures of experts included."""
    return _of_type(model, (FeedForward, GatedFeedForward))


def writers(model: nn.Module) -> dict[str, nn.Module]:
    """What stands in a block beside attention: feed-forward layers and mixtures of experts."""
    found = _of_type(model, (FeedForward, GatedFeedForward, MixtureOfExperts))
    return {name: part for name, part in found.items() if name.rpartition(".")[0] in blocks(model)}


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Mixtures of experts by name."""
    return _of_type(model, MixtureOfExperts)


def _of_type(model: nn.Module, kind: type | tuple[type, ...]) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, kind)}


def _answer(model: nn.Module, place: str, look: Look) -> Remove:
    def see(_: nn.Module, __: object, y: Tensor) -> Tensor | None:
        return look(y)

    return model.get_submodule(place).register_forward_hook(see).remove


def answering(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks whose stream the head can be asked of, each token by itself: those of its stack."""
    head = getattr(model, "head", None)
    if not isinstance(model, TaskModel) or not isinstance(head, Head) or head.needs_mask:
        return {}
    last = next(reversed(blocks(model)), "")
    return {name: part for name, part in blocks(model).items() if name.startswith(stack_of(last))}


def _logits(model: nn.Module, place: str, look: Look) -> Remove:
    assert isinstance(model, TaskModel)
    answers = Answers(model, next(reversed(blocks(model))))

    def see(_: nn.Module, __: object, y: Tensor) -> None:
        look(answers(y))

    return model.get_submodule(place).register_forward_hook(see).remove


def _input(model: nn.Module, place: str, look: Look) -> Remove:
    def see(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        found = look(given[0])
        return None if found is None else (found, *given[1:])

    return model.get_submodule(place).register_forward_pre_hook(see).remove


def _neurons(model: nn.Module, place: str, look: Look) -> Remove:
    return _input(model, f"{place}.down", look)


def _routing(model: nn.Module, place: str, look: Look) -> Remove:
    shapes: list[torch.Size] = []

    def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        # The router sees the tokens of all rows in one line.
        shapes[:] = [given[0].shape[:-1]]

    def see(_: nn.Module, __: object, logits: Tensor) -> Tensor | None:
        found = look(logits.unflatten(0, shapes[0]))
        return None if found is None else found.flatten(0, -2)

    mixture = model.get_submodule(place)
    hooks = (
        mixture.register_forward_pre_hook(note),
        mixture.get_submodule("router").register_forward_hook(see),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


KINDS: dict[str, Kind] = {
    **{stage: Kind("attention", attentions, look_into(stage)) for stage in STAGES},
    "attention_out": Kind("attention", attentions, _answer),
    "residual": Kind("block", blocks, _answer),
    "residual_in": Kind("block", blocks, _input),
    "logits": Kind("block with a head above it that reads tokens", answering, _logits),
    "neurons": Kind("feed-forward layer", feed_forwards, _neurons),
    "ffn_out": Kind("feed-forward layer", writers, _answer),
    "routing": Kind("mixture of experts", mixtures, _routing),
}
"""scores, weights `[B, H, Q, K]`, queries, heads `[B, H, T, D]`, keys, values `[B, G, K, D]`;
what attention and feed-forward layers write, what blocks read and give `[B, T, E]`; what the head
would say of that `[B, T, V]`; what neurons answer `[B, T, F]`; a router's logits `[B, T, N]`."""


def kind_of(what: str) -> Kind:
    """One of `KINDS`; ConfigError for another."""
    if what not in KINDS:
        raise ConfigError(f"what is {what!r}; choose of {', '.join(KINDS)}")
    return KINDS[what]


def kinds_of(what: str | Sequence[str]) -> list[str]:
    """Names of `KINDS`; ConfigError for none, and for what is no name of one."""
    kinds = [what] if isinstance(what, str) else list(what or ())
    if not kinds:
        raise ConfigError(f"what is empty; choose of {', '.join(KINDS)}")
    for one in kinds:
        kind_of(one)
    return kinds


def chosen(model: nn.Module, where: str, what: str) -> dict[str, nn.Module]:
    """Those who have `what`, by name, of a part of a name or a pattern of names.

    A run that `where` names after an @ is left to the caller. ConfigError where there is none.
    """
    if not isinstance(where, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"where is {where!r}; give one name or pattern, such as 'layers.3'")
    kind = kind_of(what)
    all_owners, place = kind.owners(model), where.partition("@")[0]
    found = {name: part for name, part in all_owners.items() if is_named(name, place)}
    if found:
        return found
    there = [n for n, _ in model.named_modules() if n and is_named(n, place)]
    if not all_owners:
        raise ConfigError(f"this model has no {kind.owner}, so no {what} can be seen")
    have = f"{what} can be seen of {', '.join(in_short(all_owners))}"
    if there and place != "*":
        owner = type(model.get_submodule(there[0])).__name__
        raise ConfigError(f"{there[0]} ({owner}) has no {kind.owner} in it; {have}")
    raise ConfigError(f"no {kind.owner} is called {where!r}; {have}")


def is_named(name: str, where: str) -> bool:
    """Whether a name is meant: by a part of it, whole between dots, or by a pattern."""
    return fnmatchcase(name, where) or f".{where}." in f".{name}."


def in_short(names: Iterable[str]) -> list[str]:
    """Names that differ in one number as one: `layers.{0-11}.attention`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = list(re.finditer(r"(?<=\.)\d+(?=\.|$)", f".{name}"))
        begin, end = found[-1].span() if found else (len(name) + 1, len(name) + 1)
        key = f".{name}"[1:begin], f".{name}"[end:]
        groups.setdefault(key, []).append(f".{name}"[begin:end])
    return [
        before + (f"{{{own[0]}-{own[-1]}}}" if len(own) > 1 else own[0]) + after
        for (before, after), own in groups.items()
    ]


def attention_at(model: nn.Module, layer: str | int) -> str:
    """The name of an attention: by its number in order, or by what names it alone, with the run
    after an @ where one is named."""
    names = list(attentions(model))
    if isinstance(layer, int):
        if not -len(names) <= layer < len(names):
            raise ConfigError(f"layer {layer} of {len(names)} attentions; count from 0")
        return names[layer]
    found = list(chosen(model, layer, "weights"))
    if len(found) > 1:
        raise ConfigError(f"{layer!r} names {len(found)} attentions: {', '.join(in_short(found))}")
    run = layer.partition("@")[2]
    return f"{found[0]}@{run}" if run else found[0]
