"""Activations that are made again for the gradient in place of being kept (Chen et al. 2016)."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from polyhead.models.blocks import blocks_of

Forward = Callable[..., Any]

EVERY = {"none": 0, "blocks": 1, "half": 2}
"""Of how many blocks one keeps nothing but its input."""


@contextmanager
def recomputing(model: nn.Module, which: str) -> Generator[None]:
    """Blocks run once more on the way back, for as long as this is entered: a third more work, and
    of each block only the input is kept. which: a key of EVERY. Gradients are the same, dropout's
    choices too.
    """
    every = EVERY[which]
    chosen = [model.get_submodule(name) for name in blocks_of(model)][::every] if every else []
    with run_by(chosen, _again):
        yield


@contextmanager
def run_by(
    parts: Sequence[nn.Module], make: Callable[[Forward, nn.Module], Forward]
) -> Generator[None]:
    """Parts of a model run by what `make` gives of their forward, for as long as this is entered;
    hooks and names stay as they are."""
    before = [part.__dict__.get("forward") for part in parts]
    for part in parts:
        part.forward = make(part.forward, part)
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward


def _again(forward: Forward, block: nn.Module) -> Forward:
    def run(*given: Any, **named: Any) -> Any:
        if not block.training:
            return forward(*given, **named)
        return checkpoint(forward, *given, use_reentrant=False, **named)

    return run
