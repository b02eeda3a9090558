"""`polyhead convert`: a model as a Hugging Face directory or a GGUF file, and the proof of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polyhead.cli.common import note, working
from polyhead.cli.placing import (
    check_places,
    ends,
    prove,
    random_inputs,
    size_of,
    tokenizer_metadata,
)
from polyhead.errors import ConfigError
from polyhead.serve.opening import device_named, model_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from polyhead.models.model import TaskModel

Format = Literal["hf", "gguf"]
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Args:
    """Rewrite a model. Tokenizer, template, generation and image settings travel with it.

    Without --dtype nothing is rounded: floats keep their type, and the blocks of a GGUF file stay
    as they are in another, and become float32 in a directory. --verify loads both models, compares
    what they answer to random prompts and images in float32 (the source's weights first rounded to
    --dtype), and exits with 1 above 1e-4; of blocks that --dtype names it says by how much their
    logits differ, and no more.

    Examples:
      polyhead convert smollm2-135m smol/ --to hf --verify
      polyhead convert runs/docs docs.gguf --to gguf --verify
      polyhead convert runs/docs docs-q8.gguf --to gguf --dtype q8_0
      polyhead convert big/ small/ --to hf --dtype bfloat16 --force
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")]
    """Directory (hf) or file (gguf) to write."""
    to: Format
    """hf: config.json, safetensors, tokenizer files. gguf: one file, for llama.cpp and its like."""
    verify: bool = False
    """Load the result and compare its logits with the source's; exit code 1 if they differ."""
    force: bool = False
    """Overwrite what is there."""
    dtype: Literal["keep", "float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_1"] = "keep"
    """Type of the weights written (vectors stay float32 in GGUF). q8_0, q4_0 and q4_1 are GGUF's
    blocks of 32; tables of tokens and heads are q8_0 in all three."""
    json: bool = False
    """One JSON object: source, dest, bytes, max_logit_difference."""
    device: str | None = None
    """Where --verify runs; a GPU is taken when there is one."""


def run(args: Args) -> int:
    """Convert, verify, report."""
    from polyhead.files.hub import resolve

    source = model_path(resolve(args.source))
    if args.to == "hf" and _in_blocks(args):
        raise ConfigError(f"--dtype {args.dtype} is of GGUF's blocks; use it with --to gguf")
    check_places(source, args.dest, is_gguf=args.to == "gguf", force=args.force)
    with working(f"converting {args.source}"):
        if args.to == "gguf":
            _to_gguf(source, args)
        else:
            _to_hf(source, args)
    size = size_of(args.dest)
    found: dict[str, Any] = {"source": str(source), "dest": str(args.dest), "bytes": size}
    if args.verify:
        with working("verifying"):
            found["max_logit_difference"] = _difference(source, args)
    # Written so that a difference that is not a number fails, too.
    exact = args.verify and not _in_blocks(args)
    failed = exact and not found["max_logit_difference"] <= TOLERANCE
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{args.dest}  {size / 1e6:,.1f} MB")
        if args.verify:
            print(f"largest logit difference  {found['max_logit_difference']:.3g}")
    if failed:
        note(f"polyhead: the logits differ by more than {TOLERANCE}; do not use {args.dest}")
    return 1 if failed else 0


def _in_blocks(args: Args) -> bool:
    return args.dtype.startswith("q")


def _to_gguf(source: Path, args: Args) -> None:
    from polyhead.compress.saved import PackedModel
    from polyhead.models import gguf
    from polyhead.models.load import read_checkpoint

    if source.suffix == ".gguf":
        config, tensors, file = gguf.read(source)
        tokenizer: Mapping[str, Any] = file.typed_metadata()
    else:
        model = _load(source)  # what cannot be loaded is not passed on
        config, tensors = read_checkpoint(source)
        if isinstance(model, PackedModel):
            config, tensors = model.hf_config(), model.hf_tensors()
        config = {**ends(model.generation), **config}
        tokenizer = tokenizer_metadata(source, config.get("vocab_size"))
    blocks = args.dtype.upper() if _in_blocks(args) else None
    if args.dtype != "keep":
        tensors = Cast(tensors, "float32" if blocks else args.dtype)
    args.dest.parent.mkdir(parents=True, exist_ok=True)
    gguf.write(args.dest, config, tensors, tokenizer, blocks=blocks, force=args.force)


def _to_hf(source: Path, args: Args) -> None:
    from polyhead.compress.saved import PackedModel, read

    dtype = args.dtype if args.dtype != "keep" else _widest(read(source)[1])
    model = _load(source, dtype=dtype)
    if isinstance(model, PackedModel):
        model.save(args.dest, force=args.force, floats=True)
    else:
        model.save(args.dest, force=args.force)
    prove(source, args.dest, model)


def _load(path: Path, **named: Any) -> "TaskModel":
    """A model, those in few bits too; no adapter, which would be left behind."""
    from polyhead.compress.saved import fill, read
    from polyhead.models.load import load

    return load(path, read=read, fill=fill, **named)


class Cast(Mapping[str, "Tensor"]):
    """Tensors in another type, each made when it is asked for."""

    def __init__(self, tensors: Mapping[str, "Tensor"], dtype: str) -> None:
        import torch

        self._tensors, self._dtype = tensors, getattr(torch, dtype)

    def __getitem__(self, name: str) -> "Tensor":
        tensor = self._tensors[name]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _widest(tensors: Mapping[str, "Tensor"]) -> "torch.dtype | None":
    """The type that holds every float of a checkpoint exactly."""
    import functools

    import torch

    kinds = {tensors[name].dtype for name in tensors}
    floats = [kind for kind in kinds if kind.is_floating_point]
    return functools.reduce(torch.promote_types, floats) if floats else None


def _difference(source: Path, args: Args) -> float:
    """The largest difference of what both models answer to a few random inputs, in float32."""
    import torch

    device = device_named(args.device)
    as_is = args.dtype == "keep" or _in_blocks(args)
    before = _load(source, dtype=None if as_is else args.dtype).float().to(device)
    given = {name: tensor.to(device) for name, tensor in random_inputs(before.config).items()}
    with torch.inference_mode():
        wanted = _answers(before, given)
        del before
        found = _answers(_load(args.dest, dtype=torch.float32, device=device), given)
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))


def _answers(model: "TaskModel", given: "Mapping[str, Tensor]") -> "list[Tensor]":
    """One answer, or one of each head where there are several."""
    from polyhead.nn.head import Heads

    heads = list(model.head) if isinstance(model.head, Heads) else [None]
    return [model(**given, head=head) for head in heads]
