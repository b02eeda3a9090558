"""`polyhead train`: a fresh model of any family, or a checkpoint, on text or a table."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from polyhead.cli.common import given_fields, note
from polyhead.cli.starting import FAMILIES, USUAL_FAMILY
from polyhead.errors import ConfigError, FileError
from polyhead.train.config import TrainConfig

if TYPE_CHECKING:
    from polyhead.models.model import TaskModel
    from polyhead.train.records import ExampleColumns
    from polyhead.train.registry import ObjectiveKind

DEFAULTS = TrainConfig(sample_every=250, sample_tokens=200)
# What run.json keeps, and what of it a run that goes on cannot change.
_SPEC = ("objective", "roles", "columns", "problem", "options", "sift")
_ADAPTER = ("lora", "quantize", "teacher", "distillation")
_KEPT = ("data", "model", "set", "tokenizer", "vocab_size", "valid", *_ADAPTER, *_SPEC)
_SETTLED = ("model", "set", "tokenizer", "vocab_size", *_ADAPTER, *_SPEC)
_TUPLES = ("set", "roles", "options", "distillation")
# A fresh head on a fresh model learns at a higher rate than a checkpoint should.
FRESH = {"lr": 5e-4, "epochs": 10.0}
# Small matrices beside weights that stand still bear more than the weights do.
ADAPTER = {"lr": 2e-4}


@dataclass(frozen=True)
class Args:
    """Train a model on text or on a table, with validation, checkpoints and a report.

    Examples:
      polyhead train pydocs --steps 500 --out runs/docs
      polyhead train book.txt --model llama --set d_model=256 num_layers=6 num_heads=4 --lr 2e-3
      polyhead train stdlib --tokenizer bpe --vocab-size 4096 --context 512 --out runs/code
      polyhead train more.jsonl --model runs/docs --lr 3e-4 --out runs/more
      polyhead train more.jsonl --model runs/docs --prune 0.5 --teacher self --out runs/thin
      polyhead train more.jsonl --model smollm2-135m --lora rank=16 targets=q,v --out runs/mine
      polyhead train more.jsonl --model smollm2-135m --lora --quantize nf4 --out runs/mine
      polyhead train --out runs/docs --resume
      polyhead train reviews.csv --objective classify --model minilm-l6 --label stars --out runs/r
      polyhead train posts.tsv --objective classify --model minilm-l6 --columns rating,text
        --label rating --out runs/posts
      polyhead train names.jsonl --objective tag --model minilm-l6 --out runs/names
      polyhead train tasks.toml --objective multitask --model minilm-l6 --out runs/several

    A table is .tsv, .csv, .jsonl or .parquet with named columns. For a table and a checkpoint the
    settings' defaults are 3 epochs at --lr 5e-5 falling to 0, --batch-size 32, --warmup 50,
    --weight-decay 0.01; for a table and a fresh model 10 epochs at 5e-4. A number of --steps given
    takes the place of the epochs. What is printed is the best checkpoint by the objective's metric.

    The run directory holds config.toml, run.json, log.jsonl, checkpoints and report.html. Ctrl-C
    and SIGTERM save a checkpoint and exit with 130 and 143; --resume goes on, bit for bit.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A text, a table with texts, a folder of these, a directory of `polyhead prepare`, a dataset
    as hf:NAME, pydocs (Python's documentation) or stdlib (the standard library's sources), or a
    TOML file of several by weight, a [name] for each: data, weight and text; for objectives on
    rows, a table; for multitask, a TOML file with a [name] for each task: data, head, and where
    they are needed roles and columns."""
    model: str = "gpt2"
    """A family for a fresh model (`polyhead info FAMILY` shows its fields), or a checkpoint. The
    default is by the objective: bert where it needs an encoder."""
    objective: str = "causal-lm"
    """What to learn. From texts: causal-lm, masked-lm, nsp, sop, replaced-token, span-corruption.
    From tables: classify, tag, answer, seq2seq, contrastive, image-classify, clip. From several
    tables: multitask. docs/training.md has the columns of each."""
    text: str | None = None
    """The column of the text, where it is not called text."""
    pair: str | None = None
    """The column of a second text."""
    label: str | None = None
    """The column of the label, where it is not called label."""
    roles: tuple[str, ...] = ()
    """Further columns that are not called what they are for, as in question=q context=passage."""
    columns: str | None = None
    """Names of a headerless table's columns, from left to right, between commas. Without them the
    columns of one go by number, from 0."""
    problem: str | None = None
    """single_label_classification, multi_label_classification or regression, where the values of
    the label column (words and whole numbers, lists, fractions) do not say which."""
    options: tuple[str, ...] = ()
    """The objective's own settings, name=value."""
    sift: float = 0.0
    """Above 0: adversarial training on the embeddings beside the objective (SiFT), with that
    weight; 5 is usual. Takes three passes where there was one."""
    set: tuple[str, ...] = ()
    """Fields of a fresh model's config, name=value; else a small model."""
    tokenizer: str = "auto"
    """For a fresh model: chars, bytes, bpe, wordpiece or unigram, trained on the data; or a
    directory with one. auto is chars for small texts and bpe above 8 million characters."""
    vocab_size: int | None = None
    """Tokens of a tokenizer that is trained; None is all characters, or 8192."""
    lora: tuple[str, ...] | None = None
    """Train an adapter beside a checkpoint, which stays as it is: `--lora` alone, or with rank=8,
    alpha=16, targets=q,v (or all-linear), dropout=0, rslora=true, dora=true, trained=NAME,NAME for
    parts that learn whole. A fresh head is one of these. --lr is 2e-4 then."""
    quantize: Literal["nf4", "nf6", "int4", "int8", "int8-rows"] | None = None
    """With --lora: keep the checkpoint's matrices in few bits while the adapter learns (QLoRA)."""
    teacher: str | None = None
    """A checkpoint with the same vocabulary to answer like (distillation); self is the model as the
    run found it, beside which it may be pruned."""
    distillation: tuple[str, ...] = ()
    """With --teacher: weight=0.5 (its share), temperature=2, hidden=0 and correlation=0 (how much
    the last states' cosines and cross-correlations count)."""
    sink: tuple[str, ...] = ()
    """Send the log's figures to tensorboard, trackio or wandb as well."""
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
    named = _value_of(argv, "--config")
    if named is None and "--resume" in argv:
        run = Path(_value_of(argv, "--out") or DEFAULTS.out) / "config.toml"
        named = str(run) if run.exists() else None
    settings = TrainConfig.load(named) if named is not None else None
    if settings is not None and "--config" in argv and not given_fields(argv, ["out"]):
        note(f"run directory: {settings.out}")
    out = Path(DEFAULTS.out if settings is None else settings.out)
    kept = _read_run(out, argv) if "--resume" in argv else {}
    given = tuple(sorted(given_fields(argv, (*_SETTLED, "text", "pair", "label"))))
    objective = _value_of(argv, "--objective") or kept.get("objective", "causal-lm")
    model = _value_of(argv, "--model") or FAMILIES.get(objective, USUAL_FAMILY)
    settings = settings or _settings_for(objective, model, argv)
    return Args(**{"data": tyro.MISSING, "model": model, **kept}, train=settings, given=given)


def _settings_for(objective: str, model: str, argv: Sequence[str]) -> TrainConfig:
    """The defaults of an objective and of a model, fresh or not."""
    if len(given_fields(argv, ["steps", "epochs"])) == 2:
        raise ConfigError("--steps and --epochs both say how long a run is: name one of them")
    lora = ADAPTER if given_fields(argv, ["lora"]) else {}
    if objective == "causal-lm":
        return replace(DEFAULTS, **lora)
    from polyhead.models.registry import families
    from polyhead.train.registry import objective_named

    if not objective_named(objective).columns and objective != "multitask":
        return TrainConfig(**lora)
    settings = TrainConfig.fine_tuning(**(FRESH if model in families() else lora))
    # Steps that are named take the place of the epochs.
    return replace(settings, epochs=None) if given_fields(argv, ["steps"]) else settings


def run(args: Args) -> int:
    """Train, then write the report."""
    from polyhead.adapt.load import load
    from polyhead.cli.starting import distillation_values, teacher_named
    from polyhead.train.loop import Trainer
    from polyhead.train.registry import objective_named
    from polyhead.train.sinks import sink

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    kind = objective_named(args.objective)
    columns = columns_of(args)
    run_dir = Path(args.train.out)
    if args.resume:
        _check_settled(run_dir, args.given)
    data = source_of(args.data, kind, columns)
    valid = None if args.valid is None else source_of(args.valid, kind, columns)
    model, inputs = _resumed(run_dir, kind, args) if args.resume else (None, None)
    if model is None or inputs is None:
        model, inputs = _start(args, kind, data)
    note(f"{_described(model, inputs)}, on {args.data}")
    trainer = Trainer(
        model, inputs, args.train, objective=kind, columns=columns, sift=args.sift,
        options=option_values(kind, args.options), about=_about(args, kind, columns),
        teacher=teacher_named(args.teacher, args.train, kind),
        distillation=distillation_values(args.distillation, args.teacher),
        callbacks=[sink(name) for name in args.sink],
    )  # fmt: skip
    figures = trainer.fit(data, valid, resume=args.resume, force=args.force)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks
        return 0
    if args.train.tensor > 1:  # other processes hold the rest of its layers, and have gone
        model = load(figures["checkpoint"])
    _write_report(run_dir, args, model, inputs, figures)
    if "sparsity" in figures:
        note(f"zeros: {figures['sparsity']:.2%} of the matrices' weights")
    print(figures.get("best", figures["checkpoint"]))
    note(f"report: {run_dir / 'report.html'}")
    return 0


def columns_of(args: Args) -> "ExampleColumns":
    """Where the table has what the objective reads."""
    from polyhead.train.records import ExampleColumns

    roles: dict[str, str] = {}
    for word in args.roles:
        role, equals, column = word.partition("=")
        if not equals:
            raise ConfigError(f"--roles {word!r} names no column; write role=column")
        roles[role] = column
    flags = {"text": args.text, "pair": args.pair, "label": args.label}
    roles |= {role: column for role, column in flags.items() if column is not None}
    return ExampleColumns(roles, tuple(args.columns.split(",")) if args.columns else ())


def source_of(name: str, kind: "ObjectiveKind", columns: "ExampleColumns") -> Any:
    """The table of an objective that reads one, the tasks of a file, or a corpus."""
    from polyhead.cli.corpora import corpus
    from polyhead.train.blend import open_corpora, read_blend
    from polyhead.train.records import read_table

    if kind.name == "multitask":
        from polyhead.train.multitask import opened, read_tasks
        from polyhead.train.registry import TASKS

        return opened(read_tasks(name), TASKS)
    if kind.columns:
        return read_table(name, kind.columns, columns)
    several = name.endswith(".toml") and kind.name == "causal-lm"
    return open_corpora(read_blend(name) if several else corpus(name), columns)


def option_values(kind: "ObjectiveKind", words: Sequence[str]) -> dict[str, Any]:
    """`name=value` words as the objective's options are typed."""
    known = {**kind.dataset_options, **kind.loss_options}
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--options {word!r} sets nothing; write name=value")
        try:
            values[name] = text if isinstance(known.get(name), str) else json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _about(args: Args, kind: "ObjectiveKind", columns: "ExampleColumns") -> dict[str, Any]:
    """What run.json is to say."""
    about = {name: getattr(args, name) for name in _KEPT if getattr(args, name) is not None}
    if kind.name == "causal-lm":
        about = {name: value for name, value in about.items() if name not in _SPEC}
    roles = [f"{role}={column}" for role, column in columns.roles.items()]
    spec = {"columns": args.columns, "roles": roles, "options": list(args.options)}
    return {**about, **{n: v for n, v in spec.items() if v or kind.name != "causal-lm"}}


def _described(model: "TaskModel", inputs: Any) -> str:
    size = f", {inputs.vocab_size} tokens" if hasattr(inputs, "vocab_size") else ""
    return f"{model.config.model_type}, {model.num_parameters():,} parameters{size}"


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
        return {**kept, **{name: tuple(kept.get(name, ())) for name in _TUPLES}}
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


def _resumed(run_dir: Path, kind: "ObjectiveKind", args: Args) -> "tuple[TaskModel | None, Any]":
    """Model and tokenizer of the run's newest checkpoint; what they hold, `fit` takes up."""
    from polyhead.adapt.load import load
    from polyhead.cli.starting import base_dtype, change_of, inputs_of
    from polyhead.train.checkpoint import latest

    last = latest(run_dir)
    if last is None:
        return None, None
    # Checkpoints of an embedder name a bare model: pooling has no weights.
    head = "embed" if kind.head == "embed" else None
    dtype, change = base_dtype(args.lora, args.train), change_of(args.quantize)
    return load(last, dtype=dtype, head=head, change=change), inputs_of(last, kind)


def _start(args: Args, kind: "ObjectiveKind", data: Any) -> "tuple[TaskModel, Any]":
    """A fresh model of a family with a tokenizer for the data, or a checkpoint to go on from."""
    from polyhead.cli.starting import classes_of, from_checkpoint, make_model, make_tokenizer
    from polyhead.models.registry import families
    from polyhead.train.blend import prepared_of

    classes = classes_of(data, kind, args.problem)
    if args.model in families():
        if args.lora is not None:
            raise ConfigError(
                f"--lora is for a checkpoint, beside whose weights an adapter learns; {args.model} "
                "is a family: name a checkpoint with --model"
            )
        if kind.name in ("image-classify", "clip"):
            raise ConfigError(
                f"{kind.name} starts from a checkpoint, which says how images are made ready: "
                f"name one with --model, not the family {args.model}"
            )
        texts = partial(_texts_of, data, kind)
        found = None if kind.columns or kind.name == "multitask" else prepared_of(data)
        tokenizer = make_tokenizer(args.tokenizer, args.vocab_size, texts, kind.name, found)
        return make_model(args.model, args.set, tokenizer, args.train, kind, classes), tokenizer
    if args.set or args.tokenizer != "auto" or args.vocab_size is not None:
        raise ConfigError(
            "--set, --tokenizer and --vocab-size are for a fresh model of a family, such as gpt2 "
            f"or bert; {args.model!r} is taken for a checkpoint, which has its own"
        )
    if args.quantize is not None and args.lora is None:
        raise ConfigError("--quantize keeps weights that do not learn: add --lora, which does")
    return from_checkpoint(args.model, kind, classes, args.train, args.lora, args.quantize)


def _texts_of(data: Any, kind: "ObjectiveKind") -> "Iterable[str]":
    """What a tokenizer learns from: a corpus, or the texts of a table."""
    from polyhead.train.blend import texts_of

    if kind.name == "multitask":
        tables = [task.data for task in data.values()]
    elif kind.columns:
        tables = [data]
    else:
        return texts_of(data)
    unread = ("label", "tags", "start", "answers")
    columns = [v for table in tables for role, v in table.columns.items() if role not in unread]
    # What is no text is refused, with its row, where the dataset is made.
    texts = (v for column in columns for v in column if isinstance(v, str | list))
    return (v if isinstance(v, str) else " ".join(map(str, v)) for v in texts)


def _write_report(
    run_dir: Path, args: Args, model: "TaskModel", inputs: Any, figures: dict[str, Any]
) -> None:
    from polyhead.cli.reporting import (
        attention_of,
        charts_of,
        curves_of,
        facts_of,
        samples_of,
        snippet_of,
    )
    from polyhead.train.log import read_log
    from polyhead.train.registry import objective_named
    from polyhead.train.report import Report, write_report

    kind = objective_named(args.objective)
    is_text = kind.name == "causal-lm"
    caption = {} if is_text else {"curves_caption": "Loss by step; lower is better."}
    text = source_of(args.valid or args.data, kind, columns_of(args)) if is_text else None
    report = Report(
        title=f"{model.config.model_type} on {args.data}",
        summary=f"{figures['step']} steps of {args.objective}; run directory {run_dir}",
        facts=facts_of(model, figures),
        curves=curves_of(run_dir),
        charts=charts_of({"training": read_log(run_dir / "log.jsonl")}),
        attention=attention_of(model, inputs, snippet_of(text, inputs)) if is_text else None,
        samples=samples_of(run_dir),
        **caption,
    )
    write_report(run_dir / "report.html", report)
