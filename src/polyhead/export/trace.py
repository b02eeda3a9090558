"""A graph traced by torch.export, once for all sizes of its named axes."""

import contextlib
import logging
import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.export.graphs import TRACED, Graph


def traced(
    graph: Graph, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    """The program, and the inputs that it was traced with; floats among them of the dtype.

    Errors: ConfigError for a module that is not one graph for all sizes.
    """
    random = torch.Generator().manual_seed(0)
    inputs = tuple(port.sample(TRACED, random, device, dtype) for port in graph.inputs)
    module = graph.module.eval()
    try:
        # Strict: the length of a tensor stays a symbol where Python's own len() would fix it.
        with quiet(), torch.no_grad():
            program = torch.export.export(
                module, inputs, dynamic_shapes=axes(graph, torch.export.Dim.DYNAMIC), strict=True
            )
    except Exception as error:
        raise ConfigError(
            f"{graph.name} is not one graph for all sizes: {in_a_line(error)}"
        ) from error
    return program, inputs


def axes(graph: Graph, mark: Any = None) -> dict[str, Any]:
    """Of each input its free axes, marked, or by their names."""
    return {
        "inputs": tuple(
            {at: mark or axis for at, axis in enumerate(port.axes) if isinstance(axis, str)}
            for port in graph.inputs
        )
    }


def in_a_line(error: BaseException) -> str:
    """What an error of a compiler says first."""
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without what compilers tell of themselves; an error of theirs becomes one of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
