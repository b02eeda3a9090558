"""Checkpoint names: rows read in both directions, theirs to ours and ours to theirs."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Size, Tensor

from polyhead.errors import FileError

Indices = dict[str, int]


@dataclass(frozen=True)
class Rule:
    """A tensor of theirs and what it is here. `{i}` stands for a number.

    ours:      one name, or several that theirs holds one after the other (q, k, v).
    transpose: theirs is `[in, out]`.
    stack:     theirs come one for each value of this index; ours stacks them in dimension 0.
    reshape:   the same numbers in another shape.
    heads:     the parts of ours follow one another in each of so many heads of theirs.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transpose: bool = False
    stack: str | None = None
    reshape: bool = False
    heads: int = 1


@dataclass(frozen=True)
class Dropped:
    """A tensor of theirs that holds nothing: a buffer, a mask. It is not written back."""

    theirs: str


@dataclass(frozen=True)
class Tied:
    """A tensor of theirs that repeats another; read if it stands there, written only if told."""

    theirs: str
    same_as: str
    is_written: bool = False


Rules = Sequence[Rule | Dropped | Tied]


def to_ours(
    rules: Rules,
    theirs: Mapping[str, Tensor],
    shapes: Mapping[str, Size],
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """Their tensors under our names; views where they can be.

    shapes: what the model wants, by our names. A tensor that no rule knows, one that is missing
    and one of another shape raise FileError; of those in `optional`, the latter two are left out.
    """
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    surplus: list[str] = []
    for name in theirs:
        rule, indices = _matching(rules, name)
        if rule is None:
            surplus.append(name)
        elif isinstance(rule, Rule):
            for ours, tensor in _split(rule, indices, theirs[name], shapes):
                if rule.stack:
                    stacks.setdefault(ours, {})[indices[rule.stack]] = tensor
                else:
                    found[ours] = _reshaped(tensor, shapes.get(ours)) if rule.reshape else tensor
    for ours, parts in stacks.items():
        found[ours] = _stacked(ours, parts)
    left = [*surplus, *(found.keys() - shapes.keys())]
    _complain("holds", left, "that this model has no place for", "take its own config.json")
    for name in optional:
        if name in found and found[name].shape != shapes[name]:
            del found[name]
    lacking = shapes.keys() - found.keys() - set(optional)
    remedy = "fetch it again, or take its own config.json"
    _complain("lacks", list(lacking), "that this model needs", remedy)
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise FileError(f"{name} holds {tensor.dtype}, not numbers with a point; convert it")
        if tensor.shape != shapes[name]:
            raise FileError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(shapes[name])} "
                "by its config.json; the two do not belong together"
            )
    return found


def knows(rules: Rules, name: str) -> bool:
    """Whether a rule speaks of a tensor of theirs."""
    return _matching(rules, name)[0] is not None


def differ(rules: Rules, theirs: Mapping[str, Tensor]) -> bool:
    """Whether a tensor that is said to repeat another does not."""
    return any(
        isinstance(rule, Tied)
        and not rule.is_written
        and rule.theirs in theirs
        and rule.same_as in theirs
        and not torch.equal(theirs[rule.theirs], theirs[rule.same_as])
        for rule in rules
    )


def to_theirs(rules: Rules, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, in contiguous memory of their layout."""
    made: dict[str, Tensor] = {}
    written: set[str] = set()
    for rule in rules:
        if not isinstance(rule, Rule):
            continue
        parts = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        for first in list(ours):
            indices = match(parts[0], first)
            if indices is None:
                continue
            names = [part.format(**indices) for part in parts]
            if not all(name in ours for name in names):
                continue  # some of its parts are kept in another way
            written.update(names)
            made.update(_joined(rule, indices, [ours[name] for name in names]))
    for rule in rules:
        if isinstance(rule, Tied) and rule.is_written and rule.same_as in made:
            made[rule.theirs] = made[rule.same_as].clone()
    forgotten = ours.keys() - written
    assert not forgotten, f"no rule writes {sorted(forgotten)}"
    return made


def _split(
    rule: Rule, indices: Indices, tensor: Tensor, shapes: Mapping[str, Size]
) -> Iterator[tuple[str, Tensor]]:
    if rule.transpose and tensor.dim() == 2:
        tensor = tensor.T
    if isinstance(rule.ours, str):
        yield rule.ours.format(**_without(indices, rule.stack)), tensor
        return
    names = [part.format(**indices) for part in rule.ours]
    sizes = [shapes[name][0] for name in names if name in shapes]
    rows = len(tensor) if tensor.dim() else 0
    if len(sizes) < len(names) or sum(sizes) != rows:
        raise FileError(
            f"{rule.theirs.format(**indices)} has {rows} rows and its config.json asks "
            f"for {' + '.join(map(str, sizes)) or 'none'}; the two do not belong together"
        )
    if rule.heads == 1:
        yield from zip(names, tensor.split(sizes), strict=True)
        return
    by_head = tensor.unflatten(0, (rule.heads, -1)).split([n // rule.heads for n in sizes], dim=1)
    yield from zip(names, (part.flatten(0, 1) for part in by_head), strict=True)


def _reshaped(tensor: Tensor, shape: Size | None) -> Tensor:
    # What has another number of elements is refused with the other shapes.
    fits = shape is not None and tensor.numel() == shape.numel()
    return tensor.reshape(shape) if shape is not None and fits else tensor


def _stacked(ours: str, parts: Mapping[int, Tensor]) -> Tensor:
    numbers = sorted(parts)
    if numbers != list(range(len(numbers))):
        raise FileError(
            f"the checkpoint's parts of {ours} are numbered {', '.join(map(str, numbers))}; "
            "some are missing"
        )
    if len({part.shape for part in parts.values()}) > 1:
        raise FileError(f"the checkpoint's parts of {ours} differ in shape; fetch it again")
    return torch.stack([parts[number] for number in numbers])


def _joined(rule: Rule, indices: Indices, parts: Sequence[Tensor]) -> Iterable[tuple[str, Tensor]]:
    if rule.stack:
        for number, tensor in enumerate(parts[0].unbind()):
            yield rule.theirs.format(**indices, **{rule.stack: number}), tensor.contiguous()
        return
    if rule.heads > 1:
        by_head = [part.unflatten(0, (rule.heads, -1)) for part in parts]
        parts = [torch.cat(by_head, dim=1).flatten(0, 1)]
    tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if rule.reshape:
        tensor = tensor.flatten()
    yield rule.theirs.format(**indices), (tensor.T if rule.transpose else tensor).contiguous()


def _matching(rules: Rules, name: str) -> tuple[Rule | Dropped | Tied | None, Indices]:
    for rule in rules:
        indices = match(rule.theirs, name)
        if indices is not None:
            return rule, indices
    return None, {}


def match(pattern: str, name: str) -> Indices | None:
    """The numbers that `{i}` and the like stand for, or None where the name does not fit."""
    found = _compiled(pattern).fullmatch(name)
    return None if found is None else {key: int(value) for key, value in found.groupdict().items()}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>0|[1-9][0-9]*)", re.escape(pattern)))


def _without(indices: Indices, key: str | None) -> Indices:
    return {name: number for name, number in indices.items() if name != key}


def _complain(verb: str, names: list[str], why: str, remedy: str) -> None:
    if names:
        some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
        raise FileError(f"the checkpoint {verb} {len(names)} tensor(s) {why}: {some}; {remedy}")
