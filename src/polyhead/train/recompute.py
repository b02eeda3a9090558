"""Activations that are made again for the gradient in place of being kept (Chen et al. 2016)."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from polyhead.models.blocks import blocks_of

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
    for block in chosen:
        block.forward = _again(block.forward, block)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


def _again(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def run(*given: Any, **named: Any) -> Any:
        if not block.training:
            return forward(*given, **named)
        return checkpoint(forward, *given, use_reentrant=False, **named)

    return run
