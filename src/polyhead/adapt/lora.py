"""LoRA: small matrices that learn beside the weights of a built model (Hu et al. 2021).

A layer answers W x + s B A x, with A `[R, in]` drawn and B `[out, R]` zero at first; R is the rank.
DoRA (Liu et al. 2024, equation 5) learns the length of each row of W + s B A besides.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.nn.dropout import dropout


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What an adapter is made of.

    rank, alpha: B A is scaled by alpha / rank; rslora: by alpha / sqrt(rank) (Kalajdzievski 2023).
    targets:     layers to adapt: their names or the ends of them ("q", "attention.q"), here or in
                 the checkpoint ("q_proj"), in one text between commas, or "all-linear".
    trained:     further parts that learn whole and are saved with the adapter, as a fresh head.
    dora:        learn the length of each output's weights, too. dropout: of what A reads.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    trained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}: it must be 1 or more")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"alpha is {self.alpha}: it must be a finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}: it must be from 0 to below 1")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            object.__setattr__(self, "targets", tuple(self.targets.split(",")))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Delta(nn.Module):
    """What one adapter adds to one layer: A, B and, for DoRA, the rows' lengths `[out]`."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, rate: float, magnitude: Tensor | None):
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.scale, self.rate = scale, rate

    def forward(self, x: Tensor, layer: "Adapted", share: float) -> Tensor:
        """To be added to what `layer` answers to x; `share`: how much of it counts."""
        scale = self.scale * share
        seen = dropout(x, self.rate, self.training)
        found = F.linear(F.linear(seen, self.a), self.b * scale)
        if self.magnitude is None:
            return found
        # Lengths follow the weights, but no gradient flows through them (section 4.3).
        stretch = self.magnitude / self.length(layer.whole(), scale).detach()
        plain = layer.plain(seen)
        return (stretch - 1) * plain + stretch * found

    def length(self, weight: Tensor, scale: float) -> Tensor:
        """Of the rows of the changed weight, `[out]`."""
        return (weight + self.update(scale).to(weight.dtype)).norm(dim=1)

    def update(self, scale: float) -> Tensor:
        """What the product adds to the weight `[out, in]`, in float32."""
        return scale * (self.b.float() @ self.a.float())

    def merged(self, weight: Tensor, share: float) -> Tensor:
        """The weight that answers as layer and adapter together, in float32."""
        found = weight.float() + self.update(self.scale * share)
        if self.magnitude is None:
            return found
        return found * (self.magnitude.float() / found.norm(dim=1))[:, None]


class Adapted(nn.Module):
    """Mixed into a linear layer's own class: its answers, and what its adapters in use add.

    `adapters` by name; `shares`, of those in use, how much each counts; `merged`: None, or the
    weight as it was before they became part of it.
    """

    weight: Any
    in_features: int
    out_features: int
    adapters: nn.ModuleDict
    shares: dict[str, float]
    merged: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged is not None:
            return y
        for name, share in self.shares.items():
            if name in self.adapters:
                y = y + self.adapters[name](x, self, share)
        return y

    def plain(self, x: Tensor) -> Tensor:
        """What the layer itself answers, without its bias."""
        bias = getattr(self, "bias", None)
        y = super().forward(x)
        return y if bias is None else y - bias

    def whole(self) -> Tensor:
        """The layer's own weight `[out, in]`."""
        return self.weight


@cache
def _adapted_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {})


def adapted(layer: nn.Module) -> Adapted:
    """The same layer, its weights shared, that takes adapters."""
    if isinstance(layer, Adapted):
        return layer
    found = _adapted_class(type(layer)).__new__(_adapted_class(type(layer)))
    found.__dict__ = layer.__dict__
    assert isinstance(found, Adapted)
    found.adapters = nn.ModuleDict()
    found.shares, found.merged = {}, None
    return found


def fresh(layer: Adapted, config: LoraConfig) -> Delta:
    """An adapter that changes nothing yet: A drawn as Kaiming uniform, B zero."""
    # A packed weight is not unpacked to be looked at.
    packed = getattr(layer, "packed", None)
    dtype = layer.weight.dtype if packed is None else packed.dtype
    a = torch.empty(config.rank, layer.in_features, dtype=dtype)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    b = a.new_zeros(layer.out_features, config.rank)
    magnitude = layer.whole().detach().norm(dim=1) if config.dora else None
    return Delta(a, b, config.scale, config.dropout, magnitude)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Layers that have adapters, with their names."""
    for name, part in model.named_modules():
        if isinstance(part, Adapted):
            yield name, part
