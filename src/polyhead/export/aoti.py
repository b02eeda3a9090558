"""A model compiled for one machine: a package that torch, or libtorch without Python, loads."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.export.check import Feeds, Run, largest_difference
from polyhead.export.graphs import Graph, graphs
from polyhead.export.onnx import Exported
from polyhead.export.parts import exportable
from polyhead.export.trace import in_a_line, quiet, traced
from polyhead.models.model import TaskModel


def export_aoti(model: TaskModel, path: str | Path, *, force: bool = False) -> Exported:
    """Compile `model` by AOTInductor for whole texts or images, batch and lengths free.

    In the model's dtype, for the device that it is on and for this machine's processor. The file
    ends in .pt2; `torch._inductor.aoti_load_package(path)` gives a function of the inputs in the
    order of `inputs_of`. It appears once it has been loaded and run beside the model.
    Errors: ConfigError where no C++ compiler is found or it fails, and for a model that has no such
    graph; FileError for a file that is there already (unless `force`).
    """
    path = Path(path)
    if path.suffix != ".pt2" or path.is_dir():
        raise FileError(f"{path} is no name for a package; name a file that ends in .pt2")
    if path.exists() and not force:
        raise FileError(f"{path} is there already; use force, or name another place")
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ConfigError(f"compiling needs {compiler}, which is not there; install it, or set CXX")
    graph = graphs(exportable(model, fused=True), past=False)[0]
    program, _ = traced(graph, model.device, model.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        written = Path(folder) / path.name
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(written),
                    inductor_configs={"cpp.cxx": (compiler,)},
                )
        except Exception as error:
            raise ConfigError(f"{compiler} or torch failed at it: {in_a_line(error)}") from error
        difference = largest_difference(model, [graph], _runner(written, graph))
        written.replace(path)
    return Exported((path,), difference)


def inputs_of(model: TaskModel) -> tuple[str, ...]:
    """The names of what a package's function takes, in order."""
    return tuple(port.name for port in graphs(model, past=False)[0].inputs)


def _runner(path: Path, graph: Graph) -> Run:
    compiled: Any = torch._inductor.aoti_load_package(str(path))

    def run(name: str, feeds: Feeds) -> dict[str, Tensor]:
        answers = compiled(*feeds.values())
        return dict(zip(graph.outputs, answers, strict=True))

    return run
