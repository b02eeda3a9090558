"""`polyhead train`: a fresh model of any family, or a checkpoint, on text."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.opening import given_fields, model_path, note, working
from polyhead.errors import ConfigError, FileError
from polyhead.train.config import TrainConfig

if TYPE_CHECKING:
    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer

DEFAULTS = TrainConfig(sample_every=250, sample_tokens=200)
SMALL_TEXT = 8_000_000  # characters; above it, "auto" learns merges
_SNIPPET = 48
# Sizes of a fresh model where --set says nothing: small enough to train on a laptop.
SIZES: dict[str, Any] = {"d_model": 128, "num_layers": 4, "num_heads": 4}
# What run.json keeps, and what of it a run that goes on cannot change.
_KEPT = ("data", "model", "set", "tokenizer", "vocab_size", "valid")
_SETTLED = ("model", "set", "tokenizer", "vocab_size")


@dataclass(frozen=True)
class Args:
    """Train a model on text, with validation, samples, checkpoints and a report.

    Examples:
      polyhead train pydocs --steps 500 --out runs/docs
      polyhead train book.txt --model llama --set d_model=256 num_layers=6 num_heads=4 --lr 2e-3
      polyhead train stdlib --tokenizer bpe --vocab-size 4096 --context 512 --out runs/code
      polyhead train more.jsonl --model runs/docs --lr 3e-4 --out runs/more
      polyhead train --out runs/docs --resume

    The run directory holds config.toml, run.json, log.jsonl, checkpoints and report.html. Ctrl-C
    and SIGTERM save a checkpoint and exit with 130 and 143; --resume goes on, bit for bit.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A .txt or .jsonl file, a folder of them, pydocs (Python's documentation) or stdlib (the
    standard library's sources)."""
    model: str = "gpt2"
    """A family for a fresh model (`polyhead info FAMILY` shows its fields), or a checkpoint."""
    set: tuple[str, ...] = ()
    """Fields of a fresh model's config, name=value; else a small model."""
    tokenizer: str = "auto"
    """For a fresh model: chars, bytes, bpe, wordpiece or unigram, trained on the data; or a
    directory with one. auto is chars for small texts and bpe above 8 million characters."""
    vocab_size: int | None = None
    """Tokens of a tokenizer that is trained; None is all characters, or 8192."""
    valid: str | None = None
    """Text to validate on; else the last --held-out of the tokens."""
    config: Path | None = None
    """A TOML file of the settings below (as config.toml of a run); flags win over it."""
    resume: bool = False
    """Go on from the newest checkpoint of --out, with its model, data and settings; flags win over
    the settings."""
    force: bool = False
    """Begin anew where a run already is."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = DEFAULTS
    given: tyro.conf.Suppress[tuple[str, ...]] = ()


def defaults(argv: Sequence[str]) -> Args:
    """The settings that flags win over: of --config, of the run that is resumed, or ours."""
    settings = DEFAULTS
    named = _value_of(argv, "--config")
    if named is None and "--resume" in argv:
        run = Path(_value_of(argv, "--out") or DEFAULTS.out) / "config.toml"
        named = str(run) if run.exists() else None
    if named is not None:
        settings = TrainConfig.load(named)
        if "--config" in argv and not given_fields(argv, ["out"]):
            note(f"run directory: {settings.out}")
    given = tuple(sorted(given_fields(argv, _SETTLED)))
    kept = _read_run(Path(settings.out), argv) if "--resume" in argv else {}
    return Args(**{"data": tyro.MISSING, **kept}, train=settings, given=given)


def run(args: Args) -> int:
    """Train, then write the report."""
    from polyhead.cli.corpora import corpus
    from polyhead.train.loop import Trainer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = corpus(args.data)
    valid = None if args.valid is None else corpus(args.valid)
    run_dir = Path(args.train.out)
    if args.resume:
        _check_settled(run_dir, args.given)
    model, tokenizer = _resumed(run_dir) if args.resume else (None, None)
    if model is None or tokenizer is None:
        model, tokenizer = _start(args, data)
    note(
        f"{model.config.model_type}, {model.num_parameters():,} parameters, "
        f"{tokenizer.vocab_size} tokens, on {args.data}"
    )
    about = {name: getattr(args, name) for name in _KEPT if getattr(args, name) is not None}
    trainer = Trainer(model, tokenizer, args.train, about=about)
    figures = trainer.fit(data, valid, resume=args.resume, force=args.force)
    _write_report(run_dir, args, model, tokenizer, figures)
    print(figures["checkpoint"])
    note(f"report: {run_dir / 'report.html'}")
    return 0


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    for index, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(argv):
            return argv[index + 1]
    return None


def _read_run(run_dir: Path, argv: Sequence[str]) -> dict[str, Any]:
    """What run.json says: the data, and what the model was made from."""
    run_dir = Path(_value_of(argv, "--out") or run_dir)
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: found[name] for name in _KEPT if name in found}
        return {**kept, "set": tuple(kept.get("set", ()))}
    except (OSError, ValueError, TypeError):
        raise FileError(
            f"{path} cannot be read; remove it, and give DATA and --valid again"
        ) from None


def _check_settled(run_dir: Path, given: Sequence[str]) -> None:
    """ConfigError for flags that would make another model than the run's."""
    from polyhead.train.checkpoint import latest

    if given and ((run_dir / "run.json").exists() or latest(run_dir) is not None):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"with --resume, {flags} is taken from the run {run_dir}: leave it out")


def _resumed(run_dir: Path) -> "tuple[TaskModel | None, Tokenizer | None]":
    """Model and tokenizer of the run's newest checkpoint; what they hold, `fit` takes up."""
    import torch

    from polyhead.models.load import load, tokenizer
    from polyhead.train.checkpoint import latest

    last = latest(run_dir)
    if last is None:
        return None, None
    return load(last, dtype=torch.float32), tokenizer(last)


def _start(args: Args, data: str | list[str]) -> "tuple[TaskModel, Tokenizer]":
    """A fresh model of a family with a tokenizer for the data, or a checkpoint to go on from."""
    from polyhead.models.registry import families

    if args.model in families():
        tokenizer = make_tokenizer(args.tokenizer, args.vocab_size, data)
        return make_model(args.model, args.set, tokenizer, args.train), tokenizer
    if args.set or args.tokenizer != "auto" or args.vocab_size is not None:
        raise ConfigError(
            f"--set, --tokenizer and --vocab-size are for a fresh model ({', '.join(families())}); "
            f"{args.model!r} is taken for a checkpoint, which has its own"
        )
    import torch

    from polyhead.files.hub import resolve
    from polyhead.models.load import load, tokenizer

    with working(f"loading {args.model}"):
        path = model_path(resolve(args.model))
        return load(path, dtype=torch.float32), tokenizer(path)


def make_tokenizer(kind: str, vocab_size: int | None, data: str | list[str]) -> "Tokenizer":
    """A tokenizer trained on the data, or one from a directory."""
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.text.train import KINDS
    from polyhead.train.corpus import documents

    if kind not in ("auto", *KINDS):
        if not Path(kind).exists():
            raise ConfigError(f"tokenizer {kind!r} is not auto, {', '.join(KINDS)}, or a directory")
        return Tokenizer.load(Path(kind))
    if kind == "auto":
        size = 0
        for text in documents(data):
            size += len(text)
            if size > SMALL_TEXT:
                break
        kind = "chars" if size <= SMALL_TEXT else "bpe"
    with working("training the tokenizer"):
        return Tokenizer.train(documents(data), kind=kind, vocab_size=vocab_size)


def make_model(
    family: str, settings: Sequence[str], tokenizer: "Tokenizer", config: TrainConfig
) -> "TaskModel":
    """A fresh model: what --set says, the tokenizer's size, the context, and small sizes."""
    from polyhead.cli.fields import config_fields, parse_fields
    from polyhead.models.assemble import build
    from polyhead.models.registry import family_of

    kind = family_of(family).config
    values = parse_fields(kind, settings)
    known = config_fields(kind)
    for name, value in {**SIZES, "max_seq_len": config.context}.items():
        if name in known:
            values.setdefault(name, value)
    values.setdefault("vocab_size", tokenizer.vocab_size)
    if family == "transformer":  # the paper's is an encoder-decoder, which texts alone do not train
        values.setdefault("kind", "decoder")
    if "d_ff" in known:
        values.setdefault("d_ff", 4 * values["d_model"])
    return build(family, seed=config.seed, **values)


def _snippet(args: Args) -> str:
    """The first characters of the validation text, or of the data."""
    from polyhead.cli.corpora import corpus
    from polyhead.train.corpus import documents

    return next(documents(corpus(args.valid or args.data)))[:_SNIPPET]


def _write_report(
    run_dir: Path, args: Args, model: "TaskModel", tokenizer: "Tokenizer", figures: dict[str, Any]
) -> None:
    from polyhead.cli.reporting import attention_of, curves_of, facts_of, samples_of
    from polyhead.train.report import Report, write_report

    samples = samples_of(run_dir)
    report = Report(
        title=f"{model.config.model_type} on {args.data}",
        summary=f"{figures['step']} steps; run directory {run_dir}",
        facts=facts_of(model, figures),
        curves=curves_of(run_dir),
        attention=attention_of(model, tokenizer, _snippet(args)),
        samples=samples,
    )
    write_report(run_dir / "report.html", report)
