"""The objectives by name: what each asks of the data and of the model, and what it measures."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

from polyhead.errors import ConfigError
from polyhead.train.answering import answer, answer_figures, answered_contexts
from polyhead.train.blend import text_windows
from polyhead.train.chatting import conversations
from polyhead.train.contrastive import (
    captioned_images,
    clip,
    contrastive,
    paired_texts,
    recall_figures,
)
from polyhead.train.corruption import corrupted_windows, span_corruption
from polyhead.train.data import Dataset
from polyhead.train.examples import Labels
from polyhead.train.grpo import check_policy, grpo, prompted, reward_figures
from polyhead.train.images import classified_images
from polyhead.train.masked import hit_rate, masked_lm, masked_windows
from polyhead.train.multitask import decided_tasks, mixed_tasks, multitask, task_figures
from polyhead.train.objectives import Loss, causal_lm
from polyhead.train.pairs import nsp, nsp_pairs, pair_accuracy, sop, sop_pairs
from polyhead.train.preference import (
    check_preference,
    compared_answers,
    preference,
    preference_figures,
    reward,
    reward_labels,
    rewarded_answers,
)
from polyhead.train.records import Table
from polyhead.train.replaced import detection, prepared, replaced_token, replaced_windows
from polyhead.train.seq2seq import decided_ids, seq2seq, translated_texts, translation_figures
from polyhead.train.supervised import (
    class_figures,
    class_labels,
    classified_texts,
    classify,
    decided,
    tag,
    tag_figures,
    tag_labels,
    tagged_words,
)

DatasetFactory = Callable[..., Dataset | None]
"""`(source, tokenizer, model, config, split, **options) -> dataset`.

source: texts (`corpus.Source`), or a `records.Table` where the objective has `columns`. split: see
`data.Split`; with "valid", None where the source is too short to hold any out. The digest covers
source, tokenizer and options: a run is resumed only on the same.
"""

Metric = Callable[[Any, Dataset, Sequence[Any]], Mapping[str, float]]
"""`(model, dataset, answers) -> figures` of a validation, the one to judge by first, higher is
better. answers: `Loss.answers` of every batch, in order, on the CPU."""


@dataclass(frozen=True)
class ObjectiveKind:
    """One row.

    head:    what the model needs, as `load(…, head=)` names it; "" where any will do.
    loss:    `(model, batch, **options) -> Loss`.
    also:    other heads that will do.
    kinds:   of models it can train, as their configs say; empty where the factory checks.
    prepare: `(model) -> model`, what is trained in its place.
    check:   `(**loss_options) -> None`, ConfigError for values that these cannot have.
    decide:  `(model, tokenizer, source) -> None`: writes into the model what these say of it and it
             leaves open, for those who read it later.
    labels:  `(table, problem) -> Labels`, what a fresh head is to tell apart, where it has classes.
    columns: the columns it reads of a table, by the name of their role, and whether each must be
             there; empty where the source is plain text.
    options: settings of its own and their defaults; those a factory or a loss names are passed to
             it. `dataset_options` to `dataset`, `loss_options` to `loss`.
    """

    name: str
    help: str
    head: str
    dataset: DatasetFactory
    loss: Callable[..., Loss]
    metric: Metric | None = None
    also: tuple[str, ...] = field(default=(), kw_only=True)
    kinds: tuple[str, ...] = field(default=(), kw_only=True)
    prepare: Callable[[Any], Any] | None = field(default=None, kw_only=True)
    check: Callable[..., None] | None = field(default=None, kw_only=True)
    decide: Callable[[Any, Any, Any], None] | None = field(default=None, kw_only=True)
    labels: Callable[[Table, str | None], Labels] | None = None
    columns: Mapping[str, bool] = field(default_factory=dict[str, bool])
    dataset_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loss_options: Mapping[str, Any] = field(default_factory=dict[str, Any])


# What reads texts and may carry a head of classes.
_READERS = ("encoder", "decoder")
_COMPARED = {"prompt": True, "chosen": True, "rejected": True, "system": False}
_MASKING = {"choice": "token", "ratio": 0.15, "mask": 0.8, "random": 0.1, "max_span": 10}
_ROWS = (
    ObjectiveKind(
        "causal-lm",
        "predict each token from those before it",
        "lm",
        text_windows,
        causal_lm,
        dataset_options={"by_document": False},
    ),
    ObjectiveKind(
        "chat",
        "answer in conversations: the loss is on the answers alone",
        "lm",
        conversations,
        causal_lm,
        kinds=("decoder",),
        columns=dict.fromkeys(("messages", "prompt", "answer", "system"), False),
        dataset_options={"raw": False, "pack": False},
    ),
    ObjectiveKind(
        "dpo",
        "prefer the better of two answers (DPO, conservative DPO, IPO, length-normalised)",
        "lm",
        compared_answers,
        preference,
        preference_figures,
        kinds=("decoder",),
        columns=_COMPARED,
        dataset_options={"raw": False},
        loss_options={"variant": "dpo", "beta": 0.1, "smoothing": 0.0},
        check=check_preference,
    ),
    ObjectiveKind(
        "reward",
        "a measure of how good an answer is, from pairs of a better and a worse one",
        "classify",
        rewarded_answers,
        reward,
        preference_figures,
        reward_labels,
        kinds=_READERS,
        columns=_COMPARED,
        dataset_options={"raw": False},
    ),
    ObjectiveKind(
        "grpo",
        "answers of the model's own, judged by a function, each beside others to the same prompt",
        "lm",
        prompted,
        grpo,
        reward_figures,
        kinds=("decoder",),
        columns={"prompt": True, "answer": False, "system": False},
        dataset_options={
            "reward": "",
            "group": 8,
            "max_new_tokens": 64,
            "temperature": 1.0,
            "raw": False,
        },
        loss_options={"clip": 0.2, "kl": 0.0},
        check=check_policy,
    ),
    ObjectiveKind(
        "masked-lm",
        "fill in tokens, whole words or spans",
        "lm",
        masked_windows,
        masked_lm,
        hit_rate,
        kinds=("encoder",),
        dataset_options=_MASKING,
    ),
    ObjectiveKind(
        "nsp",
        "fill in tokens, and tell whether one segment follows the other",
        "pretraining",
        nsp_pairs,
        nsp,
        pair_accuracy,
        also=("nsp",),
        dataset_options=_MASKING,
    ),
    ObjectiveKind(
        "sop",
        "fill in tokens, and tell which of two segments comes first",
        "pretraining",
        sop_pairs,
        sop,
        pair_accuracy,
        also=("sop",),
        dataset_options=_MASKING,
    ),
    ObjectiveKind(
        "replaced-token",
        "find the tokens that a small generator put in",
        "rtd",
        replaced_windows,
        replaced_token,
        detection,
        prepare=prepared,
        dataset_options={"choice": "token", "ratio": 0.15, "max_span": 10},
        loss_options={"weight": 50.0},
    ),
    ObjectiveKind(
        "span-corruption",
        "write out the spans that were taken from a text",
        "lm",
        corrupted_windows,
        span_corruption,
        hit_rate,
        kinds=("encoder-decoder",),
        decide=decided_ids,
        dataset_options={"density": 0.15, "mean_span": 3.0},
    ),
    ObjectiveKind(
        "classify",
        "classes of texts or pairs: one each, several, or a measure",
        "classify",
        classified_texts,
        classify,
        class_figures,
        class_labels,
        kinds=_READERS,
        decide=decided,
        columns={"text": True, "label": True, "pair": False},
    ),
    ObjectiveKind(
        "tag",
        "a tag for every word: names, parts of speech",
        "tag",
        tagged_words,
        tag,
        tag_figures,
        tag_labels,
        kinds=_READERS,
        columns={"tokens": True, "tags": True},
    ),
    ObjectiveKind(
        "answer",
        "the span of a context that answers a question, or none",
        "answer",
        answered_contexts,
        answer,
        answer_figures,
        columns={
            **dict.fromkeys(("question", "context"), True),
            **dict.fromkeys(("answer", "start", "answers"), False),
        },
        dataset_options={"stride": 64},
    ),
    ObjectiveKind(
        "image-classify",
        "classes of images",
        "classify",
        classified_images,
        classify,
        class_figures,
        class_labels,
        kinds=("vision",),
        decide=decided,
        columns={"image": True, "label": True},
    ),
    ObjectiveKind(
        "seq2seq",
        "write the target of a source: translation, summaries",
        "lm",
        translated_texts,
        seq2seq,
        translation_figures,
        kinds=("encoder-decoder",),
        decide=decided_ids,
        columns={"source": True, "target": True},
        loss_options={"smoothing": 0.1},
    ),
    ObjectiveKind(
        "contrastive",
        "vectors in which texts are near that belong together",
        "embed",
        paired_texts,
        contrastive,
        recall_figures,
        kinds=_READERS,
        columns={"text": True, "pair": True, "negative": False},
        loss_options={"scale": 20.0, "symmetric": False, "chunk": 0},
    ),
    ObjectiveKind(
        "clip",
        "vectors in which a text is near its image",
        "contrastive",
        captioned_images,
        clip,
        recall_figures,
        kinds=("two towers",),
        columns={"image": True, "text": True},
        loss_options={"chunk": 0},
    ),
)

# What several heads on one backbone learn, by the head.
TASKS = {row.head: row for row in _ROWS if row.name in ("classify", "tag", "answer")}
_MULTITASK = ObjectiveKind(
    "multitask",
    "several heads on one backbone, each on a table of its own",
    "multitask",
    partial(mixed_tasks, TASKS),
    partial(multitask, TASKS),
    partial(task_figures, TASKS),
    kinds=_READERS,
    decide=partial(decided_tasks, TASKS),
)

OBJECTIVES: dict[str, ObjectiveKind] = {row.name: row for row in (*_ROWS, _MULTITASK)}


def objective_named(name: str) -> ObjectiveKind:
    """A row. ConfigError for a name that none has."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


_SUCH_AS = {
    "encoder": "an encoder, such as bert",
    "decoder": "a decoder, such as gpt2",
    "encoder-decoder": "an encoder-decoder, such as t5",
    "vision": "a model of images, such as vit",
    "two towers": "a model of texts and images, such as clip",
}


def check_kind(objective: ObjectiveKind, model_type: str, kind: str) -> None:
    """ConfigError for a kind of model that the objective cannot train."""
    if objective.kinds and kind not in objective.kinds:
        wanted = " or ".join(_SUCH_AS[one] for one in objective.kinds)
        raise ConfigError(f"{objective.name} needs {wanted}; {model_type} is of the kind {kind}")


def check_model(objective: ObjectiveKind, model: Any) -> None:
    """ConfigError for a model of another kind, or with another head."""
    config, head = model.config, objective.head
    check_kind(objective, config.model_type, getattr(config, "kind", "decoder"))
    if head and model.head_kind not in (head, *objective.also):
        raise ConfigError(
            f"{objective.name} needs a model with the head {head!r}, and this one's is "
            f"{model.head_kind!r}: load or build it with head={head!r}"
        )


@dataclass(frozen=True)
class Options:
    """Settings of an objective: those that were given, and what its two parts are to be passed."""

    given: Mapping[str, Any]
    dataset: Mapping[str, Any]
    loss: Mapping[str, Any]


def settled(kind: ObjectiveKind, given: Mapping[str, Any]) -> Options:
    """Options with the defaults of what was not given. ConfigError for unknown names and types."""
    known = {**kind.dataset_options, **kind.loss_options}
    for name, value in given.items():
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{kind.name} has no option {name!r}; {has}")
        default = known[name]
        is_number = isinstance(default, float) and type(value) is int
        if default is not None and type(value) is not type(default) and not is_number:
            wanted = type(default).__name__
            raise ConfigError(f"option {name} is {value!r}: it must be of type {wanted}")
    parts = [
        {name: given.get(name, default) for name, default in some.items()}
        for some in (kind.dataset_options, kind.loss_options)
    ]
    if kind.check is not None:
        kind.check(**parts[1])
    return Options(dict(given), *parts)


def sealed(kind: ObjectiveKind, options: Options, digest: str) -> str:
    """What a checkpoint knows its data by: what it is, and what is asked of it."""
    if kind.name == "causal-lm":
        return digest
    said = json.dumps([kind.name, dict(options.dataset), dict(options.loss)], default=str)
    return sha256(f"{said} {digest}".encode()).hexdigest()
