"""Blocks that torch.compile makes faster, from outside and one by one (torchtitan's regions)."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyhead.errors import ConfigError
from polyhead.train.depth import blocks_of


@contextmanager
def compiling(model: nn.Module, on: bool, device: torch.device) -> Generator[None]:
    """While this is entered, blocks that train run compiled; blocks that are alike share what was
    compiled. Names, weights and hooks are as they were; validation and samples run as written.

    Losses are those of the blocks as written up to rounding; what dropout draws is another.
    Errors: ConfigError where nothing is there to compile with.
    """
    blocks = [model.get_submodule(name) for name in blocks_of(model)] if on else []
    if on:
        _check_compiler(device)
    for block in blocks:
        block.forward = _compiled(block.forward, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _compiled(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    fast = torch.compile(forward)

    def run(*given: Any, **named: Any) -> Any:
        return (fast if block.training else forward)(*given, **named)

    return run


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("compile needs Triton on a GPU, which is not installed: leave it out")
    name = os.environ.get("CXX") or ("g++" if device.type == "cpu" else "gcc")
    if shutil.which(name) is None:
        raise ConfigError(f"compile needs a compiler, and {name} is not found: leave it out")
