"""`polyhead export`: a model for other runtimes, and by how much it differs there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polyhead.cli.common import note, working
from polyhead.cli.placing import carry_over
from polyhead.errors import ConfigError
from polyhead.serve.opening import device_named, model_path

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Args:
    """Write a model for onnxruntime (a directory), or compile it for this machine (a .pt2 file).

    Batch and lengths stay free. What is written is run beside the model, at sizes and paddings
    other than those that it was made with, before it appears; in float32 a difference above 1e-4 of
    the largest answer is exit code 1. GGUF and Hugging Face directories: see polyhead convert.

    Examples:
      polyhead export minilm-l6 --to onnx --out minilm-onnx
      polyhead export smollm2-135m --to onnx --out smol-onnx --quantize int8
      polyhead export runs/mood --to aoti --out mood.pt2
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    to: Literal["onnx", "aoti"]
    """onnx: ONNX files and the tokenizer, named as Hugging Face's optimum does. aoti: one package
    of AOTInductor, for whole texts or images; needs a C++ compiler."""
    out: Path
    """Directory (onnx) or .pt2 file (aoti) to write."""
    past: bool = True
    """Models that write take and give keys and values: a step costs one token. Without, they answer
    whole texts alone (onnx)."""
    quantize: Literal["int8"] | None = None
    """Matrices in eight bits, about a quarter of the size; answers differ by what that costs
    (onnx)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights (bfloat16: aoti alone)."""
    device: str | None = None
    """What to compile for (aoti); the CPU, unless named."""
    force: bool = False
    """Overwrite what is there."""
    json: bool = False
    """One JSON object: model, files, bytes, max_difference (null where nothing could check)."""


def run(args: Args) -> int:
    """Export, check, report."""
    _check(args)
    from polyhead.files.hub import resolve
    from polyhead.models.load import load

    source = model_path(resolve(args.model))
    with working(f"exporting {args.model}"):
        model = load(source, dtype=args.dtype)
        if args.to == "onnx":
            from polyhead.export.onnx import export_onnx

            found = export_onnx(
                model, args.out, past=args.past, quantize=args.quantize, force=args.force
            )
            carry_over(source, args.out, model.config.max_tokens)
        else:
            from polyhead.export.aoti import export_aoti

            model = model.to(device_named(args.device or "cpu"))
            found = export_aoti(model, args.out, force=args.force)
    sizes = {path: path.stat().st_size for path in found.files}
    most = None if found.difference is None else found.difference.most
    if args.json:
        said: dict[str, Any] = {"model": args.model, "files": [str(path) for path in sizes]}
        print(json.dumps({**said, "bytes": sum(sizes.values()), "max_difference": most}))
    else:
        for path, size in sizes.items():
            print(f"{path}  {size / 1e6:,.1f} MB")
        print("not checked: onnxruntime is not installed" if most is None
              else f"largest difference  {most:.3g}")  # fmt: skip
    is_exact = args.quantize is None and args.dtype == "float32"
    # Written so that a difference that is not a number fails, too.
    failed = is_exact and found.difference is not None and not found.difference.share <= TOLERANCE
    if failed:
        note(f"polyhead: the answers differ by more than {TOLERANCE}; do not use {args.out}")
    return 1 if failed else 0


def _check(args: Args) -> None:
    """ConfigError for flags that do not go together."""
    if args.to == "onnx" and (args.dtype != "float32" or args.device is not None):
        raise ConfigError("--dtype and --device are for --to aoti; ONNX files are float32 here")
    if args.to == "aoti" and (args.quantize is not None or not args.past):
        raise ConfigError("--quantize and --no-past are for --to onnx; leave them out")
