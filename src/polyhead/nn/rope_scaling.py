"""Ways to stretch rotary frequencies past the trained length; each a frozen value.

`frequencies(dim, base, length)` gives the `[dim / 2]` fp32 angles per position. `length` is the
number of positions in use and matters to the dynamic kind alone.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Scaling(Protocol):
    """What `Rotary` asks of a scaling."""

    @property
    def magnitude(self) -> float:
        """The factor on cosines and sines."""
        ...

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """Angles per position, `[dim / 2]` fp32."""
        ...


def plain_frequencies(dim: int, base: float) -> Tensor:
    """`base^(-2i/dim)` (Su et al. 2021, section 3.2.2)."""
    # Always real numbers, also while a model is laid out on the meta device.
    even = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu")
    return 1.0 / base ** (even.float() / dim)


@dataclass(frozen=True)
class Unscaled:
    """The frequencies of the paper."""

    magnitude: float = 1.0

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """`plain_frequencies`."""
        return plain_frequencies(dim, base)


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float
    magnitude: float = 1.0

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """All frequencies divided by `factor`."""
        return plain_frequencies(dim, base) / self.factor


@dataclass(frozen=True)
class DynamicNTK:
    """A base that grows with the length once it passes `trained_len` (NTK-aware scaling)."""

    factor: float
    trained_len: int
    magnitude: float = 1.0

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """Frequencies of the stretched base."""
        length = max(length, self.trained_len)
        stretch = self.factor * length / self.trained_len - (self.factor - 1)
        return plain_frequencies(dim, base * stretch ** (dim / (dim - 2)))


@dataclass(frozen=True)
class Yarn:
    """NTK by parts with a temperature (Peng et al. 2023).

    Dimensions that turn more than `beta_fast` times within `trained_len` stay; those that turn
    less than `beta_slow` times are divided by `factor`; a linear ramp joins them. `truncate`
    rounds the ramp's ends to whole dimensions.
    """

    factor: float
    trained_len: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """Frequencies kept, interpolated or in between."""
        low, high = (self._turning(turns, dim, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # Equal ends would divide by zero.
        width = high - low if high != low else 0.001
        plain = plain_frequencies(dim, base)
        ramp = ((torch.arange(len(plain), device=plain.device) - low) / width).clamp(0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _turning(self, turns: float, dim: int, base: float) -> float:
        """The (fractional) dimension that turns `turns` times within the trained length."""
        return dim * math.log(self.trained_len / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature, `0.1 mscale ln(factor) + 1`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: short waves stay, waves over `trained_len / low_factor` are divided."""

    factor: float
    low_factor: float
    high_factor: float
    trained_len: int
    magnitude: float = 1.0

    def frequencies(self, dim: int, base: float, length: int) -> Tensor:
        """Frequencies kept, divided by `factor`, or a blend in the band between."""
        plain = plain_frequencies(dim, base)
        wavelength = 2 * math.pi / plain
        blend = (self.trained_len / wavelength - self.low_factor) / (
            self.high_factor - self.low_factor
        )
        blended = (1 - blend) * plain / self.factor + blend * plain
        long = wavelength > self.trained_len / self.low_factor
        short = wavelength < self.trained_len / self.high_factor
        return torch.where(short, plain, torch.where(long, plain / self.factor, blended))
