"""ONNX files of a model, checked in onnxruntime: what comes out of them is what it answers."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.export.check import Difference, Feeds, Run, largest_difference
from polyhead.export.graphs import Graph, graphs
from polyhead.export.parts import exportable, in_float32
from polyhead.export.trace import axes, in_a_line, quiet, traced
from polyhead.models.model import TaskModel
from polyhead.models.sentence import write_sentences

QUANTIZED = "_quantized"
"""What optimum puts behind the name of a file in eight bits."""
_LACKING = "ONNX needs onnx, onnxscript and onnxruntime: pip install 'polyhead[onnx]'"


@dataclass(frozen=True)
class Exported:
    """The files, and by how much their answers differ from the model's; None: not checked."""

    files: tuple[Path, ...]
    difference: Difference | None


def export_onnx(
    model: TaskModel,
    directory: str | Path,
    *,
    past: bool = True,
    quantize: str | None = None,
    force: bool = False,
) -> Exported:
    """Write `model` as ONNX, float32, batch and lengths free, and run it beside the model.

    past:     models that write take and give keys and values: one file serves whole texts (past of
              length 0) and steps. An encoder-decoder is three files. False: whole texts alone.
    quantize: "int8" stores the matrices in eight bits and multiplies in them (onnxruntime's
              dynamic quantisation); its answers differ by what that costs.
    Names of files and tensors are those of Hugging Face's optimum. Files appear only once they have
    run; without onnxruntime they are not run, and `difference` is None.
    Errors: ConfigError for a model that has no such graph, and where onnx or onnxscript are not
    installed; FileError for files that are there already (unless `force`).
    """
    if quantize not in (None, "int8"):
        raise ConfigError(f"quantize is {quantize!r}; use int8, or leave it out")
    _need("onnx", "onnxscript", *(["onnxruntime"] if quantize else []))
    model = in_float32(model)
    folder, found = Path(directory), graphs(exportable(model), past)
    suffix = QUANTIZED if quantize else ""
    names = [f"{graph.name}{suffix}.onnx" for graph in found]
    _check_place(folder, ["config.json", *names], force)
    folder.mkdir(parents=True, exist_ok=True)
    # In the same place, so that moving is renaming.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        plain, written = Path(name) / "plain", Path(name) / "written"
        plain.mkdir()
        written.mkdir()
        for graph in found:
            path = _write(graph, written if quantize is None else plain)
            if quantize is not None:
                _quantize(path, written / f"{graph.name}{suffix}.onnx")
        paths = {graph.name: written / f"{graph.name}{suffix}.onnx" for graph in found}
        difference = None
        if _has("onnxruntime"):
            difference = largest_difference(model, found, runner(paths))
        files = sorted(path.name for path in written.iterdir())
        _describe(model, written)
        for path in written.iterdir():
            _move(path, folder / path.name)
    return Exported(tuple(folder / name for name in files), difference)


def runner(paths: Mapping[str, Path]) -> Run:
    """onnxruntime on the CPU, one session a file. Errors: ConfigError for a file it refuses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        sessions = {
            name: onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            for name, path in paths.items()
        }
    except Exception as error:
        raise ConfigError(f"onnxruntime does not take the file: {in_a_line(error)}") from error

    def run(name: str, feeds: Feeds) -> dict[str, Tensor]:
        session = sessions[name]
        asked = {given.name for given in session.get_inputs()}  # a graph may read less
        given = {key: value.numpy() for key, value in feeds.items() if key in asked}
        names = [output.name for output in session.get_outputs()]
        outputs = session.run(names, given)
        return {key: torch.from_numpy(value) for key, value in zip(names, outputs, strict=True)}

    return run


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _need(*modules: str) -> None:
    if not all(map(_has, modules)):
        raise ConfigError(_LACKING)


def _check_place(folder: Path, names: Sequence[str], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; name a directory")
    if not force and (there := next((folder / n for n in names if (folder / n).exists()), None)):
        raise FileError(f"{there} is there already; use force, or name another place")


def _write(graph: Graph, folder: Path) -> Path:
    """One graph as a file; weights beyond two gigabytes lie in another beside it."""
    program, inputs = traced(graph)
    try:
        with quiet():
            found: Any = torch.onnx.export(
                program,
                inputs,
                input_names=[port.name for port in graph.inputs],
                output_names=list(graph.outputs),
                dynamic_shapes=axes(graph),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ConfigError(f"{graph.name} cannot be said in ONNX: {in_a_line(error)}") from error
    # Where each node came from in our sources is of no use to who runs it.
    for node in found.model.graph.all_nodes():
        node.metadata_props.clear()
    for value in [*found.model.graph.inputs, *found.model.graph.outputs]:
        value.metadata_props.clear()
    path = folder / f"{graph.name}.onnx"
    found.save(path)
    return path


def _describe(model: TaskModel, folder: Path) -> None:
    """What a saved model says of itself."""
    if model.sentences is not None and model.head_kind in ("none", "embed"):
        config: Any = model.config
        write_sentences(folder, model.sentences, config.d_model)
    said = {"config.json": model.hf_config(), "generation_config.json": model.generation}
    for name, data in said.items():
        if data:
            (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _move(path: Path, to: Path) -> None:
    """A file or a folder takes the place of what stands there."""
    if to.is_dir():
        shutil.rmtree(to)
    path.replace(to)


def _quantize(path: Path, to: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            path, to, weight_type=QuantType.QInt8, per_channel=True,
            use_external_data_format=path.with_suffix(".onnx.data").exists(),
        )  # fmt: skip
