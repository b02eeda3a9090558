"""Rotary positions: queries and keys turned by where they stand."""

import torch
from torch import Tensor

from polyhead.nn.position import Position
from polyhead.nn.rope_scaling import Scaling, Unscaled


class Rotary(Position):
    """Rotation of query and key halves by position (Su et al. 2021), half-split as in `LLaMA`.

    base is theta; scaling stretches the frequencies. Angles are computed in fp32.
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, scaling: Scaling | None = None
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary positions need an even number")
        self.head_dim = head_dim
        self.base = base
        self.scaling: Scaling = scaling or Unscaled()
        self._plain = self.scaling.frequencies(head_dim, base, 0)

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        cos, sin = self.angles(at)
        return Rotation(cos.to(dtype), sin.to(dtype))

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return Rotation(*self.angles(at)).rotate(x, at)

    def angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B|1, 1, T, D]` of positions `[B|1, T]`, fp32."""
        return self._angles(at, self._plain)

    def _angles(self, at: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        turns = at[:, None, :, None].float() * frequencies.to(at.device)
        turns = torch.cat([turns, turns], dim=-1)
        return turns.cos() * self.scaling.magnitude, turns.sin() * self.scaling.magnitude

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, scaling={self.scaling}"


class DynamicRotary(Rotary):
    """Rotary whose frequencies depend on how far the text reaches.

    A longer text turns every key anew, so keys are cached unrotated and all turn alike. Past the
    trained length a token's answer depends on the length at which it was computed, so decoding
    equals one forward over the whole only up to there.
    """

    rotates_late = True

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        frequencies = self._frequencies(at)
        return LateRotation(self._angles(at, frequencies), self._angles(keys_at, frequencies), at)

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return Rotation(*self._angles(at, self._frequencies(at))).rotate(x, at)

    def _frequencies(self, at: Tensor) -> Tensor:
        """Each row's own, so that a row does not depend on its batch: `[B|1, 1, 1, D / 2]`."""
        lengths: list[int] = (at.max(1).values + 1).tolist()
        rows = [self.scaling.frequencies(self.head_dim, self.base, length) for length in lengths]
        return torch.stack(rows)[:, None, None]


class Rotation(Position):
    """Rotary angles of one forward."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class LateRotation(Position):
    """Rotary angles of one forward, for the queries and for all the keys that are read."""

    rotates_late = True

    def __init__(
        self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], at: Tensor
    ) -> None:
        super().__init__()
        self.queries, self.keys, self.at = Rotation(*queries), Rotation(*keys), at

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return (self.queries if at is self.at else self.keys).rotate(x, at)
