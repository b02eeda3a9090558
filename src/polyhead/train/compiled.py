"""Blocks that torch.compile makes faster, from outside and one by one (torchtitan's regions)."""

import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.blocks import blocks_of
from polyhead.nn.moe import MixtureOfExperts
from polyhead.train.recompute import Forward, run_by


@contextmanager
def compiling(model: nn.Module, device: torch.device) -> Generator[None]:
    """While this is entered, blocks that train run compiled; blocks that are alike share what was
    compiled. Names, weights and hooks are as they were; validation and samples run as written, and
    so do mixtures of experts, whose shapes are in the data.

    Losses are those of the blocks as written up to rounding; what dropout draws is another.
    Errors: ConfigError where nothing is there to compile with.
    """
    _check_compiler(device)
    blocks = [model.get_submodule(name) for name in blocks_of(model)]
    experts = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
    with run_by(experts, _as_written), run_by(blocks, _fast):
        yield


def _as_written(forward: Forward, part: nn.Module) -> Forward:
    return torch.compiler.disable(forward)


def _fast(forward: Forward, block: nn.Module) -> Forward:
    compiled = torch.compile(forward)

    def run(*given: Any, **named: Any) -> Any:
        return (compiled if block.training else forward)(*given, **named)

    return run


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("compile needs Triton on a GPU, which is not installed: leave it out")
    name = os.environ.get("CXX") or ("g++" if device.type == "cpu" else "gcc")
    if shutil.which(name) is None:
        raise ConfigError(f"compile needs a compiler, and {name} is not found: leave it out")
