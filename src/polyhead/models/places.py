"""Where a tensor of ours lies in a checkpoint, by the rows that map its names."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size

from polyhead.models.keys import Rule, Rules, match


@dataclass(frozen=True)
class Source:
    """What a tensor of ours is of theirs: rows of one, turned first or not, or all of a stack."""

    names: tuple[str, ...]
    rows: slice
    is_turned: bool
    is_stack: bool = False


def place_of(rules: Rules, ours: str) -> tuple[Rule, int, str] | None:
    """The rule that writes a tensor of ours, which of its parts that is, and the name there."""
    for rule in rules:
        if isinstance(rule, Rule):
            parts = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
            for number, part in enumerate(parts):
                if (indices := match(part, ours)) is not None and not rule.stack:
                    return rule, number, rule.theirs.format(**indices)
    return None


def source_of(rules: Rules, ours: str, shapes: Mapping[str, Size]) -> Source | None:
    """Where a tensor of ours lies in theirs; None where no rule says so by whole rows."""
    for rule in rules:
        if not isinstance(rule, Rule) or rule.reshape or rule.heads > 1:
            continue
        parts = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        for number, part in enumerate(parts):
            if (indices := match(part, ours)) is None:
                continue
            if rule.stack:
                each = ({**indices, rule.stack: e} for e in range(shapes[ours][0]))
                names = tuple(rule.theirs.format(**numbers) for numbers in each)
                return Source(names, slice(None), rule.transpose, is_stack=True)
            before = sum(shapes[one.format(**indices)][0] for one in parts[:number])
            rows = slice(before, before + shapes[ours][0])
            return Source((rule.theirs.format(**indices),), rows, rule.transpose)
    return None
