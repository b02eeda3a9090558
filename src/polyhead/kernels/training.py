"""A model that trains by kernels of our own, for as long as it is asked to."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from polyhead.kernels import attend, norm, pointwise, rotate

DOUBLES = {**attend.DOUBLES, **norm.DOUBLES, **pointwise.DOUBLES, **rotate.DOUBLES}


@contextmanager
def fused(model: nn.Module) -> Generator[None]:
    """Attention, norms, gates, activations and rotations of `model` by kernels, forward and
    backward, while this is entered; equal but for rounding.

    On a CPU with g++; what is elsewhere or of other types stays with torch. Parameters and names
    are the same throughout. Gradients of gradients are not made; a deep copy stays as it is here.
    """
    changed = [(part, type(part)) for part in model.modules() if type(part) in DOUBLES]
    for part, kind in changed:
        part.__class__ = DOUBLES[kind]
    try:
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind
