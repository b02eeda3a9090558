"""What a run of `polyhead train` starts from: a fresh model of a family, or a checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyhead.cli.common import working
from polyhead.errors import ConfigError
from polyhead.serve.opening import model_path
from polyhead.train.config import TrainConfig

if TYPE_CHECKING:
    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.train.registry import ObjectiveKind

SMALL_TEXT = 8_000_000  # characters; above it, "auto" learns merges
# Sizes of a fresh model where --set says nothing: small enough to train on a laptop.
SIZES: dict[str, Any] = {"d_model": 128, "num_layers": 4, "num_heads": 4}
SENTINELS = 100  # as T5 has
# The family of a fresh model where --model says nothing.
FAMILIES = {
    **dict.fromkeys(("causal-lm", "chat", "dpo", "grpo"), "gpt2"),
    "seq2seq": "transformer",
    "span-corruption": "t5",
    "sop": "albert",
    "replaced-token": "deberta-v2",
    "image-classify": "vit",
    "clip": "clip",
}
USUAL_FAMILY = "bert"


def classes_of(data: Any, kind: "ObjectiveKind", problem: str | None) -> dict[str, Any]:
    """What a head is to tell apart, as `load` and `build` take it: labels and problem, or tasks."""
    if kind.name == "multitask":
        from polyhead.train.multitask import tasks_of
        from polyhead.train.registry import TASKS

        return {"tasks": tasks_of(data, TASKS)}
    if kind.labels is None:
        return {}
    found = kind.labels(data, problem)
    return {"labels": found.names, "problem": found.problem}


def from_checkpoint(
    name: str,
    kind: "ObjectiveKind",
    classes: Mapping[str, Any],
    config: TrainConfig,
    lora: Sequence[str] | None = None,
    quantize: str | None = None,
) -> "tuple[TaskModel, Any]":
    """A checkpoint with the head of an objective, and what makes its inputs.

    lora: of an adapter that is to learn in place of it; quantize: what it is kept as then.

    A head that knows all labels of the data is kept with its own; else the data's are its labels,
    and it is drawn fresh where their number is another.
    """
    from polyhead.adapt.load import load
    from polyhead.files.hub import resolve
    from polyhead.train.registry import check_model

    with working(f"loading {name}"):
        path = model_path(resolve(name))
        told = {} if _knows(path, classes) else classes
        dtype, change = base_dtype(lora, config), change_of(quantize)
        model = load(path, dtype=dtype, head=kind.head or None, change=change, **told)
        check_model(kind, model)
        if lora is not None:
            _adapt(model, lora)
        return model, inputs_of(path, kind)


def base_dtype(lora: Sequence[str] | None, config: TrainConfig) -> str:
    """What a checkpoint is loaded as: float32 where it learns, as its masters are."""
    return "float32" if lora is None else config.dtype


def change_of(quantize: str | None) -> "Callable[[TaskModel], TaskModel] | None":
    """What becomes of a model before an adapter is put on."""
    if quantize is None:
        return None
    from polyhead.compress.quantize import quantize as packed

    return partial(packed, form=quantize)


def _adapt(model: "TaskModel", words: Sequence[str]) -> None:
    """Put on a fresh adapter; one that is there already learns on."""
    from polyhead.adapt.adapters import adapters_of, add_adapter
    from polyhead.adapt.lora import LoraConfig
    from polyhead.cli.fields import parse_fields

    if adapters_of(model):
        if words:
            raise ConfigError("the checkpoint is an adapter, which has its own --lora; say no more")
        return
    add_adapter(model, LoraConfig(**parse_fields(LoraConfig, words)))


def teacher_named(
    name: str | None, config: TrainConfig, kind: "ObjectiveKind"
) -> "TaskModel | Literal['self'] | None":
    """The model to answer like, with the head of an objective."""
    if name is None or name == "self":
        return name
    from polyhead.adapt.load import load
    from polyhead.files.hub import resolve

    with working(f"loading {name}"):
        return load(model_path(resolve(name)), dtype=config.dtype, head=kind.head or None)


def distillation_values(words: Sequence[str], teacher: str | None) -> dict[str, float]:
    """`name=value` words as settings of `distilled`."""
    if words and teacher is None:
        raise ConfigError("--distillation says how a --teacher is followed, and there is none")
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if name not in ("weight", "temperature", "hidden", "correlation"):
            raise ConfigError(
                f"--distillation {word!r}: write weight=, temperature=, hidden= or correlation= "
                "and a number"
            )
    return found


def inputs_of(path: Path, kind: "ObjectiveKind") -> Any:
    """The tokenizer of a directory, or the processor of its images, or both."""
    if kind.name == "image-classify":
        from polyhead.images import Processor

        return Processor.load(path)
    from polyhead.adapt.load import tokenizer

    if kind.name == "clip":
        from polyhead.images import Processor
        from polyhead.train.contrastive import TextsAndImages

        return TextsAndImages(tokenizer(path), Processor.load(path))
    return tokenizer(path)


def _knows(path: Path, classes: Mapping[str, Any]) -> bool:
    """Whether the classes of a checkpoint's head are those of the data."""
    from polyhead.files.jsons import read_json

    data = read_json(path / "config.json") if path.is_dir() else {}
    if "tasks" in classes:
        return data.get("polyhead_tasks") == classes["tasks"]
    named = data.get("id2label")
    known = set(named.values()) if isinstance(named, dict) else set[str]()
    same_problem = data.get("problem_type") in (None, classes.get("problem"))
    return set(classes.get("labels", ())) <= known and same_problem


def make_tokenizer(
    kind: str,
    vocab_size: int | None,
    texts: Callable[[], Iterable[str]],
    objective: str = "causal-lm",
    prepared: Path | None = None,
) -> "Tokenizer":
    """A tokenizer trained on texts, which are asked for twice, or one from a directory; of tokens
    that are prepared, theirs.

    "auto" is by the objective: wordpiece, whose special tokens encoders need; bpe for sequences to
    sequences, and with sentinels for span-corruption; for causal-lm chars where the texts are few,
    else bpe.
    """
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.text.train import KINDS

    if kind not in ("auto", *KINDS):
        if not Path(kind).exists():
            raise ConfigError(f"tokenizer {kind!r} is not auto, {', '.join(KINDS)}, or a directory")
        return Tokenizer.load(Path(kind))
    if prepared is not None:
        if kind != "auto" or vocab_size is not None:
            raise ConfigError(f"{prepared} has a tokenizer: leave out --tokenizer and --vocab-size")
        return Tokenizer.load(prepared)
    if kind == "auto" and objective == "causal-lm":
        size = 0
        for text in texts():
            size += len(text)
            if size > SMALL_TEXT:
                break
        kind = "chars" if size <= SMALL_TEXT else "bpe"
    elif kind == "auto":
        kind = "bpe" if objective in ("seq2seq", "span-corruption") else "wordpiece"
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    extra = sentinels if objective == "span-corruption" else []
    with working("training the tokenizer"):
        return Tokenizer.train(texts(), kind=kind, vocab_size=vocab_size, extra_tokens=extra)


def make_model(
    family: str,
    settings: Sequence[str],
    tokenizer: "Tokenizer",
    config: TrainConfig,
    kind: "ObjectiveKind",
    classes: Mapping[str, Any],
) -> "TaskModel":
    """A fresh model: what --set says, the tokenizer's size, the context, and small sizes."""
    from polyhead.cli.fields import config_fields, parse_fields
    from polyhead.models.assemble import build
    from polyhead.models.registry import family_of
    from polyhead.train.registry import check_kind

    made = family_of(family).config
    values = parse_fields(made, settings)
    known = config_fields(made)
    for name, value in {**SIZES, "max_seq_len": config.context}.items():
        if name in known:
            values.setdefault(name, value)
    values.setdefault("vocab_size", tokenizer.vocab_size)
    if "position_buckets" in known:  # DeBERTa's usual 256 do not fit a short context
        values.setdefault("position_buckets", min(256, values["max_seq_len"]))
    if family == "transformer":  # the paper's is both, which texts alone do not train
        values.setdefault("kind", _transformer_kind(kind))
    if "d_ff" in known:
        values.setdefault("d_ff", 4 * values["d_model"])
    check_kind(kind, family, values.get("kind", getattr(made, "kind", "decoder")))
    values |= classes
    return build(family, head=kind.head or None, seed=config.seed, **values)


def _transformer_kind(kind: "ObjectiveKind") -> str:
    if kind.name == "causal-lm":
        return "decoder"
    return "encoder-decoder" if kind.name in ("seq2seq", "span-corruption") else "encoder"
