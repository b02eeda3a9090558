"""Linear layers of a built backbone as two narrow ones, and where a checkpoint holds these.

`Config.ranks` names them: `{"layers.0.ffn.up": 64}`, by our names within the backbone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.keys import Dropped, Rule, Rules, Tied, match
from polyhead.nn.low_rank import LowRankLinear

WITHIN = "polyhead."
"""What stands, after a family's prefix, before our own names in a checkpoint."""


def factor(backbone: nn.Module, ranks: Mapping[str, int] | None) -> None:
    """Put two narrow layers in the place of each that is named, with fresh weights.

    Errors: ConfigError for a name that is no linear layer's, and a rank that cannot be.
    """
    for name, rank in (ranks or {}).items():
        owner, _, last = name.rpartition(".")
        parts = dict(backbone.named_modules())
        if not isinstance(parts.get(name), nn.Linear):
            raise ConfigError(f"ranks names {name!r}, and the model has no such linear layer")
        layer: Any = parts[name]
        rows, columns = layer.weight.shape
        if not 1 <= rank <= min(rows, columns):
            raise ConfigError(
                f"the rank of {name} is {rank}; it must be from 1 to {min(rows, columns)}"
            )
        narrow = LowRankLinear(columns, rows, rank, layer.bias is not None)
        setattr(parts[owner], last, narrow)


def with_factors(rules: Rules, ranks: Mapping[str, int] | None, prefix: str) -> Rules:
    """A family's checkpoint map, with our own names for what its own cannot say: the narrow layers,
    and the layers which a file holds together with one of these (GPT-2's q, k and v)."""
    if not ranks:
        return rules
    names = [
        f"{name}.{part}" for name in ranks
        for part in ("first.weight", "second.weight", "second.bias")
    ]  # fmt: skip
    factored = {f"{name}.{kind}" for name in ranks for kind in ("weight", "bias")}
    names += sorted({name for name in _beside(rules, factored) if name not in factored})
    return (*(Rule(f"{prefix}{WITHIN}{name}", name) for name in names), *rules)


def _beside(rules: Sequence[Rule | Dropped | Tied], names: set[str]) -> Iterator[str]:
    """What a file holds in one tensor with some of these names."""
    for rule in rules:
        if not isinstance(rule, Rule) or isinstance(rule.ours, str):
            continue
        for name in names:
            for part in rule.ours:
                if (indices := match(part, name)) is not None:
                    yield from (other.format(**indices) for other in rule.ours)
