"""A model type as a row of data: its names, its heads, and what it says beyond its family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.heads import EMBED, HeadKind, multitask

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What a `model_type` says beyond its family's config.

    stem:     what Hugging Face's class names begin with.
    prefix:   what stands before a backbone's tensors in a checkpoint that has a head.
    heads:    what it can carry; the first is a fresh model's.
    pooler:   makes the vector of a whole text, where the type has one.
    keys:     `config.json` keys of the family that this type calls otherwise.
    absent:   values of `config.json` keys that the file leaves out.
    implied:  fields that the type fixes and `config.json` does not say.
    fixed:    `config.json` keys that are understood with one value alone.
    harmless: further keys that change nothing.
    renamed:  what tensors' names in older files begin with, in this order, and with today.
    """

    model_type: str
    stem: str
    prefix: str = ""
    heads: Mapping[str, HeadKind] = field(default_factory=dict[str, HeadKind])
    pooler: Callable[[Any], nn.Module] | None = None
    keys: Mapping[str, str] = field(default_factory=dict[str, str])
    absent: JSON = field(default_factory=dict[str, Any])
    implied: JSON = field(default_factory=dict[str, Any])
    fixed: JSON = field(default_factory=dict[str, Any])
    harmless: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])

    def kind(self, head: str) -> HeadKind:
        """One of the heads; raises ConfigError for one that this type does not have."""
        if head == "multitask":
            return multitask(self.heads)
        if head == "embed":
            return EMBED
        if head not in self.heads:
            there = ", ".join(dict.fromkeys([*self.heads, "embed", "none"]))
            raise ConfigError(f"{self.model_type} has no head {head!r}; it has {there}")
        return self.heads[head]

    def architecture(self, head: str) -> str:
        """Hugging Face's class for this type with a head."""
        return self.stem + ("Model" if head == "none" else self.kind(head).suffix)

    def head_of(self, architecture: str) -> str | None:
        """The head that a class of Hugging Face's has; None for one that is not known here."""
        suffixes = {kind.suffix: name for name, kind in reversed(list(self.heads.items()))}
        suffixes["ForMultiTask"] = "multitask"
        suffixes.setdefault("Model", "none")
        if architecture.startswith(self.stem):
            return suffixes.get(architecture.removeprefix(self.stem))
        # A type that goes by another's class, as some fine-tuned checkpoints do.
        longest = sorted(suffixes, key=len, reverse=True)
        return next((suffixes[end] for end in longest if architecture.endswith(end)), None)
