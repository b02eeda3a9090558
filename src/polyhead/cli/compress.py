"""`polyhead compress`: a model in few bits, and what that saves and costs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polyhead.cli.common import read_text, working
from polyhead.cli.placing import check_places, ends, prove, size_of, tokenizer_metadata
from polyhead.cli.texts import print_table, progress
from polyhead.errors import ConfigError, PolyheadError
from polyhead.serve.opening import Dtype, device_named, model_path

if TYPE_CHECKING:
    from torch import Tensor

    from polyhead.cli.compress_table import Cost, Measure
    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer

    Step = Callable[[TaskModel], TaskModel]

_AT_ONCE = 2048  # tokens of a batch of calibration


@dataclass(frozen=True)
class Args:
    """Write a model in few bits, in smaller shapes or with zeros; show what it saves and costs.

    The result is a directory that every verb and `ph.load` take, bit for bit what was made; or a
    GGUF file, where --out ends in .gguf: int4 as Q4_1, int8 as Q8_0, fp16 and bf16 as they are.
    `polyhead convert` unpacks a directory to floats again.

    The table is of the model as it runs here, activations in eight bits where the CPU multiplies
    such weights: bytes, tokens a second, perplexity on a held-out text (of models that do not
    write: the cosine of their answers), and how far answers to the same inputs lie apart.

    Examples:
      polyhead compress smollm2-135m --to int8 --out smol-int8/
      polyhead compress runs/docs --to int4 --method gptq --calibration book.txt --out docs-int4/
      polyhead compress runs/docs --to int4 --out docs.gguf --text held-out.txt --json
      polyhead compress runs/docs --prune 0.3 --to int8 --out docs-thin/
      polyhead compress runs/docs --heads 0.3 --calibration book.txt --out docs-fewer/
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    out: Path
    """Directory to write, or a file that ends in .gguf."""
    to: Literal["int8", "int4", "int8-rows", "nf4", "nf6", "fp16", "bf16"] | None = None
    """What weights are kept in; int8 and int4 are fast on a CPU. None leaves them floats."""
    heads: float = 0.0
    """First leave out this share of each attention's heads: the model is smaller then. Of decoders
    and encoder-decoders --calibration says which count, of others their weights."""
    kv_heads: float = 0.0
    """The same of heads of keys and values, with all heads that read them."""
    neurons: float = 0.0
    """The same of the feed-forwards' inner width."""
    experts: float = 0.0
    """The same of each mixture's experts."""
    prune: float | None = None
    """First set this share of the blocks' weights to zero, those of least magnitude."""
    prune_by: Literal["layer", "global", "2:4"] = "layer"
    """Of each matrix its share, of all together, or two of every four, half of all."""
    method: Literal["nearest", "gptq", "awq"] = "nearest"
    """How int8 and int4 are rounded; the latter two by what layers read of --calibration."""
    tuning: int | None = None
    """How many times int4 reads --calibration again, to move its steps until the model answers as
    before, in the time and memory of training; None is once after gptq, 0 never."""
    group: Literal[32, 64, 128] = 32
    """Weights that share their steps in int8 and int4; fewer lose less."""
    embeddings: (
        Literal["int8", "int4", "int8-rows", "nf4", "nf6", "fp16", "bf16", "none"] | None
    ) = None
    """Tables of tokens and language heads, which bear few bits ill; none leaves them."""
    calibration: str | None = None
    """A UTF-8 text like those to come; None is Python's own documentation."""
    calibration_tokens: int = 16384
    """So much of it is read."""
    text: str | None = None
    """A UTF-8 text to measure perplexity on; None is the end of Python's documentation."""
    text_length: int = 20000
    """So many characters of it are read."""
    unmeasured: bool = False
    """Write the model and measure nothing."""
    force: bool = False
    """Overwrite what is there."""
    json: bool = False
    """One JSON object: model, out, before, after, cost."""
    dtype: Dtype = "auto"
    """What the model computes in; auto keeps the checkpoint's."""
    device: str | None = None
    """Where calibration and measures run; a GPU is taken when there is one."""


def run(args: Args) -> int:
    """Compress, write, measure, report."""
    from polyhead.adapt.load import load
    from polyhead.cli.compress_table import check_text
    from polyhead.compress.export import check
    from polyhead.compress.quantize import finer_form
    from polyhead.files.hub import resolve

    source, is_gguf = model_path(resolve(args.model)), args.out.suffix == ".gguf"
    check_places(source, args.out, is_gguf=is_gguf, force=args.force)
    _check(args)
    if args.calibration_tokens < 1 or args.text_length < 2:
        raise ConfigError("--calibration-tokens and --text-length must be above 1")
    with working(f"loading {args.model}"):
        dtype = None if args.dtype == "auto" else args.dtype
        model = load(source, dtype=dtype, device=device_named(args.device))
    forms = () if args.to is None else (args.to, args.embeddings or finer_form(args.to))
    if is_gguf:
        check(model.hf_config(), *forms)
    words = _tokenizer(source)
    text = _text(args.text, held_out=True)[: args.text_length]
    if not args.unmeasured:
        check_text(model, words, text)
    made = model
    for step in _steps(args, model, words):
        made = step(made)
    with working(f"writing {args.out}"):
        _write(made, source, args, is_gguf)
    del made
    found: dict[str, Any] = {"model": str(source), "out": str(args.out)}
    if args.unmeasured:
        found["bytes"] = size_of(args.out)
        print(json.dumps(found) if args.json else f"{args.out}  {found['bytes'] / 1e6:,.1f} MB")
        return 0
    before, after, cost = _measured(args, model, words, text, source)
    if args.json:
        tables = {"before": asdict(before), "after": asdict(after), "cost": asdict(cost)}
        print(json.dumps({**found, **tables}))
        return 0
    print_table(["", "before", "after"], _rows(before, after, cost))
    return 0


def _check(args: Args) -> None:
    """ConfigError where there is nothing to do, or where a word would be read by nobody."""
    if args.to is None and not _zeros(args) and not any(_shares(args).values()):
        raise ConfigError("there is nothing to do: name a form with --to, a share with --prune")
    if args.prune_by == "global" and not args.prune:
        raise ConfigError(
            "--prune-by global says what goes, not how much: name a share with --prune"
        )
    given = {
        "method": args.method != "nearest",
        "tuning": args.tuning is not None,
        "group": args.group != 32,
        "embeddings": args.embeddings is not None,
    }
    for name, is_given in given.items():
        if is_given and args.to is None:
            raise ConfigError(f"--{name} {getattr(args, name)} is of a form: name one with --to")


def _zeros(args: Args) -> float:
    """The share of weights that is to be zero."""
    if args.prune is None:
        return 0.5 if args.prune_by == "2:4" else 0.0
    return args.prune


def _steps(args: Args, model: "TaskModel", words: "Tokenizer | None") -> "list[Step]":
    """What becomes of the model, one thing after another."""
    from polyhead.compress.prune import prune

    steps: list[Step] = []
    if any(_shares(args).values()):
        steps.append(partial(_shrunk, args, words))
    if zeros := _zeros(args):
        steps.append(partial(prune, sparsity=zeros, by=args.prune_by))
    if args.to is not None:
        steps.append(_rounding(args, args.to, model, words))
    return steps


def _shares(args: Args) -> dict[str, float]:
    """What is to go of the model's parts."""
    return {name: getattr(args, name) for name in ("heads", "kv_heads", "neurons", "experts")}


def _shrunk(args: Args, words: "Tokenizer | None", model: "TaskModel") -> "TaskModel":
    """Parts left out, those that count least."""
    from polyhead.compress.importance import importance
    from polyhead.compress.structures import shrink

    kind = getattr(model.config, "kind", "decoder")
    says = words is not None and model.head_kind == "lm" and kind in ("decoder", "encoder-decoder")
    with working("finding what counts least"):
        counts = importance(model, _batches(args, model, words)) if says else None
    return shrink(model, **_shares(args), importance=counts)


def _rounding(args: Args, form: str, model: "TaskModel", words: "Tokenizer | None") -> "Step":
    """Weights in few bits."""
    from polyhead.compress.export import check_widths
    from polyhead.compress.quantize import quantize

    reads = args.method != "nearest" or args.tuning
    batches = _batches(args, model, words) if reads else []

    def step(model: "TaskModel") -> "TaskModel":
        if args.out.suffix == ".gguf":
            check_widths(model, form)
        with progress(f"{form} by {args.method}") as told:
            return quantize(
                model,
                form,
                embeddings=args.embeddings,
                group=args.group,
                method=args.method,
                calibration=batches,
                tuning=args.tuning,
                progress=told,
            )

    return step


def _batches(
    args: Args, model: "TaskModel", words: "Tokenizer | None"
) -> "list[dict[str, Tensor]]":
    """Windows of the calibration's text, as a model's arguments."""
    import torch

    kind = getattr(model.config, "kind", "decoder")
    if words is None or kind in ("vision", "two towers", "image-text"):
        asked = "--tuning" if args.method == "nearest" else f"--method {args.method}"
        raise ConfigError(
            f"{asked} reads texts, which a {model.config.model_type} here does not take alone: "
            "leave it out, or use ph.quantize with calibration= of its inputs"
        )
    ids = words.encode(_text(args.calibration, held_out=False), add_special_tokens=False)
    length = min(512, model.config.max_tokens or 512, len(ids))
    whole = min(len(ids), args.calibration_tokens) // max(length, 1)
    if whole < 1:
        raise ConfigError(
            f"{min(len(ids), args.calibration_tokens)} tokens of calibration are too few for one "
            f"text of {length}: give more text, or more --calibration-tokens"
        )
    windows = torch.tensor(ids[: whole * length]).view(-1, length)
    found = [{"input_ids": some} for some in windows.split(max(1, _AT_ONCE // length))]
    if kind == "encoder-decoder":
        target: int = getattr(model.config, "target_vocab_size", None) or words.vocab_size
        found = [{**some, "decoder_input_ids": some["input_ids"] % target} for some in found]
    return found


def _text(name: str | None, *, held_out: bool) -> str:
    """A file's text, or one half of Python's documentation: the halves share no long line."""
    if name is not None:
        return read_text(name)
    from polyhead.cli.corpora import pydocs, split

    halves = split(pydocs())
    return halves.held_out if held_out else halves.train


def _tokenizer(source: Path) -> "Tokenizer | None":
    from polyhead.adapt.load import tokenizer

    try:
        return tokenizer(source)
    except PolyheadError:
        return None


def _write(model: "TaskModel", source: Path, args: Args, is_gguf: bool) -> None:
    from polyhead.compress.export import write_gguf
    from polyhead.compress.saved import PackedModel
    from polyhead.files.gguf import open_gguf
    from polyhead.models import gguf

    if not is_gguf:
        model.save(args.out, force=args.force)
        prove(source, args.out, model)
        return
    config = {**ends(model.generation), **model.hf_config()}
    words: Any = (
        open_gguf(source).typed_metadata()
        if source.suffix == ".gguf"
        else tokenizer_metadata(source, config.get("vocab_size"))
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PackedModel):
        write_gguf(args.out, model, config, words, force=args.force)
    else:
        gguf.write(args.out, config, model.hf_tensors(), words, force=args.force)


def _measured(
    args: Args, model: "TaskModel", words: "Tokenizer | None", text: str, source: Path
) -> "tuple[Measure, Measure, Cost]":
    """Both models as they run here; the new one as it comes back from the disk."""
    from polyhead.adapt.load import load
    from polyhead.cli.compress_table import cost, inputs_of, measure

    given = inputs_of(model, words, text)
    with working("measuring the model as it was"):
        before, whole = measure(model, words, text, given, size_of(source))
    dtype = None if args.dtype == "auto" else args.dtype
    packed = {"packed": True} if args.out.suffix == ".gguf" else {}
    small = load(args.out, dtype=dtype, device=model.device, **packed)
    with working("measuring what became of it"):
        after, found = measure(small, words, text, given, size_of(args.out))
    return before, after, cost(whole, found)


def _rows(before: "Measure", after: "Measure", cost: "Cost") -> Sequence[Sequence[str]]:
    """The table: nothing that was not measured."""
    both = (
        ("on disk", "disk_bytes", lambda x: f"{x / 1e6:,.1f} MB"),
        ("in memory", "memory_bytes", lambda x: f"{x / 1e6:,.1f} MB"),
        ("read a second", "read_per_second", lambda x: f"{x:,.0f}"),
        ("tokens written a second", "written_per_second", lambda x: f"{x:,.1f}"),
        ("perplexity", "perplexity", lambda x: f"{x:.4f}"),
    )
    rows = [
        [name, show(getattr(before, field)), show(getattr(after, field))]
        for name, field, show in both
        if getattr(before, field) is not None
    ]
    return [
        *rows,
        ["largest change of an answer", "", f"{cost.largest_change:.4g}"],
        ["cosine of the answers", "", f"{cost.cosine:.6f}"],
        ["same first choice", "", f"{cost.same_choice:.2%}"],
    ]
