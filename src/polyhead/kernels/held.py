"""Where keys and values lie that are kept in blocks. G key/value heads, D head width."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Held:
    """Where one layer keeps its keys and values `[G * blocks * size, D]`, in bytes with `scales`,
    as halves, or as the model computes them.

    tables: `[rows, columns]` int64, the block of each `size` positions of a row's text; a block
    stands in the stretch of each head. window: how far back the layer looks, or None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    tables: Tensor
    size: int
    blocks: int
    num_heads: int
    window: int | None
