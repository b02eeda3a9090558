"""`polyhead convert`: a model as a Hugging Face directory or a GGUF file, and the proof of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polyhead.cli.opening import device_named, model_path, note, working
from polyhead.errors import FileError, PolyheadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from polyhead.models.model import TaskModel

Format = Literal["hf", "gguf"]
TOLERANCE = 1e-4
# Globs of what a converted model writes, or removes when it was another model's.
_WRITTEN = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
_PROMPTS, _PROMPT_TOKENS, _SEED = 4, 32, 0


@dataclass(frozen=True)
class Args:
    """Rewrite a model. Tokenizer, template, generation and image settings travel with it.

    Without --dtype nothing is rounded: floats keep their type, and the blocks of a GGUF file stay
    as they are in another, and become float32 in a directory. --verify loads both models, compares
    what they answer to random prompts and images in float32 (the source's weights first rounded to
    --dtype), and exits with 1 above 1e-4.

    Examples:
      polyhead convert smollm2-135m smol/ --to hf --verify
      polyhead convert runs/docs docs.gguf --to gguf --verify
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
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Type of the weights written (vectors stay float32 in GGUF)."""
    json: bool = False
    """One JSON object: source, dest, bytes, max_logit_difference."""
    device: str | None = None
    """Where --verify runs; a GPU is taken when there is one."""


def run(args: Args) -> int:
    """Convert, verify, report."""
    from polyhead.files.hub import resolve

    source = model_path(resolve(args.source))
    _check_places(source, args)
    with working(f"converting {args.source}"):
        if args.to == "gguf":
            _to_gguf(source, args)
        else:
            _to_hf(source, args)
    size = _size(args.dest)
    found: dict[str, Any] = {"source": str(source), "dest": str(args.dest), "bytes": size}
    if args.verify:
        with working("verifying"):
            found["max_logit_difference"] = _difference(source, args)
    # Written so that a difference that is not a number fails, too.
    failed = args.verify and not found["max_logit_difference"] <= TOLERANCE
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{args.dest}  {size / 1e6:,.1f} MB")
        if args.verify:
            print(f"largest logit difference  {found['max_logit_difference']:.3g}")
    if failed:
        note(f"polyhead: the logits differ by more than {TOLERANCE}; do not use {args.dest}")
    return 1 if failed else 0


def _check_places(source: Path, args: Args) -> None:
    """FileError for a destination that is the source, of the wrong kind, or in the way."""
    dest = args.dest
    if dest.exists() and dest.resolve() == source.resolve():
        raise FileError(f"{dest} is the source; name another place")
    if args.to == "gguf" and dest.is_dir():
        raise FileError(f"{dest} is a directory; name a file, as in {dest / 'model.gguf'}")
    if args.to == "hf" and dest.suffix == ".gguf":
        raise FileError(f"{dest} ends in .gguf; name a directory, or use --to gguf")
    if args.force:
        return
    if args.to == "gguf" and dest.exists():
        raise FileError(f"{dest} is there already; use --force, or name another place")
    if args.to == "hf" and (there := next((f for n in _WRITTEN for f in dest.glob(n)), None)):
        raise FileError(f"{there} is there already; use --force, or name another place")


def _to_gguf(source: Path, args: Args) -> None:
    from polyhead.files.jsons import read_json
    from polyhead.models import gguf
    from polyhead.models.load import load, read_checkpoint

    if source.suffix == ".gguf":
        config, tensors, file = gguf.read(source)
        tokenizer: Mapping[str, Any] = file.typed_metadata()
    else:
        load(source)  # what cannot be loaded is not passed on
        config, tensors = read_checkpoint(source)
        # Ids that only the generation settings name belong to the file as well.
        config = {**_ends(read_json(source / "generation_config.json")), **config}
        tokenizer = _tokenizer_metadata(source, config.get("vocab_size"))
    if args.dtype != "keep":
        tensors = Cast(tensors, args.dtype)
    args.dest.parent.mkdir(parents=True, exist_ok=True)
    gguf.write(args.dest, config, tensors, tokenizer, force=args.force)


def _to_hf(source: Path, args: Args) -> None:
    from polyhead.images.processor import Processor
    from polyhead.models.load import load, read_checkpoint, tokenizer
    from polyhead.text.directory import state_length

    dtype = args.dtype if args.dtype != "keep" else _widest(read_checkpoint(source)[1])
    model = load(source, dtype=dtype)
    model.save(args.dest, force=args.force)
    if (source / "preprocessor_config.json").exists():
        Processor.load(source).save(args.dest)
    try:
        words = tokenizer(source)
    except PolyheadError as error:
        note(f"no tokenizer travels: {error}")
        return
    words.save(args.dest, force=True)
    state_length(args.dest, model.config.max_tokens)


def _tokenizer_metadata(source: Path, vocab_size: int | None) -> Mapping[str, Any]:
    """GGUF's metadata of a directory's tokenizer; none where there is no tokenizer."""
    from polyhead.models.gguf_tokenizer import tokenizer_of

    try:
        return tokenizer_of(source if source.is_dir() else source.parent, vocab_size)
    except PolyheadError as error:
        note(f"no tokenizer travels: {error}")
        return {}


def _ends(generation: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: generation[name] for name in names if isinstance(generation.get(name), int)}


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


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _difference(source: Path, args: Args) -> float:
    """The largest difference of what both models answer to a few random inputs, in float32."""
    import torch

    from polyhead.models.load import load

    device = device_named(args.device)
    before = load(source, dtype=None if args.dtype == "keep" else args.dtype).float().to(device)
    given = {name: tensor.to(device) for name, tensor in _inputs(before.config).items()}
    with torch.inference_mode():
        wanted = _answers(before, given)
        del before
        found = _answers(load(args.dest, dtype=torch.float32, device=device), given)
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))


def _answers(model: "TaskModel", given: "Mapping[str, Tensor]") -> "list[Tensor]":
    """One answer, or one of each head where there are several."""
    from polyhead.nn.head import Heads

    heads = list(model.head) if isinstance(model.head, Heads) else [None]
    return [model(**given, head=head) for head in heads]


def _inputs(config: Any) -> "dict[str, Tensor]":
    """Random arguments for a model of any kind, in a batch of a few."""
    import torch

    from polyhead.models.vision_config import pair

    kind = getattr(config, "kind", "decoder")
    random = torch.Generator().manual_seed(_SEED)
    given: dict[str, Tensor] = {}
    if kind != "vision":
        length = min(_PROMPT_TOKENS, config.max_tokens or _PROMPT_TOKENS)
        ids = torch.randint(config.vocab_size, (_PROMPTS, length), generator=random)
        if kind == "image-text":
            image, room = config.image_token_id, config.tokens_per_image
            ids[ids == image] = (image + 1) % config.vocab_size
            spare = max(1, config.max_seq_len - room)
            ids = torch.cat([ids.new_full((_PROMPTS, room), image), ids[:, :spare]], dim=1)
        given["input_ids"] = ids
        if kind == "encoder-decoder":
            target = getattr(config, "target_vocab_size", config.vocab_size)
            given["decoder_input_ids"] = ids.flip(1) % target
    if kind in ("vision", "two towers", "image-text"):
        tower = config if kind == "vision" else config.vision
        size = pair("image_size", tower.image_size)
        shape = (_PROMPTS, tower.num_channels, *size)
        given["pixel_values"] = torch.randn(shape, generator=random)
    return given
