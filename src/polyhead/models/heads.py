"""The heads a model type can carry, and where each stands in a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.keys import Dropped, Rule, Rules, Tied
from polyhead.nn.head import Classifier, Heads, LanguageHead, LastTokenClassifier, SpanHead
from polyhead.nn.pooling import Pooling


def no_rules(config: Any) -> Rules:
    """The map of a head that owns nothing."""
    return ()


@dataclass(frozen=True)
class HeadKind:
    """One head of a model type.

    suffix: of Hugging Face's class ("ForMaskedLM"). build: the head of a config. rules: its
    checkpoint map; `ours` are names inside the head, `theirs` those of a model that has it.
    """

    suffix: str
    build: Callable[[Any], nn.Module]
    rules: Callable[[Any], Rules] = no_rules


def language(
    suffix: str = "ForCausalLM",
    embedding: str = "model.embed_tokens.weight",
    theirs: str = "lm_head.weight",
) -> HeadKind:
    """A language head, tied to the embedding as the config says."""

    def build(config: Any) -> LanguageHead:
        return LanguageHead(config.d_model, config.vocab_size)

    def rules(config: Any) -> Rules:
        tied = getattr(config, "tie_embeddings", False)
        return (Tied(theirs, embedding),) if tied else (Rule(theirs, "weight"),)

    return HeadKind(suffix, build, rules)


def both(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """The rules of a layer's weight and bias."""
    return Rule(f"{theirs}.weight", f"{ours}.weight"), Rule(f"{theirs}.bias", f"{ours}.bias")


def last_token_classifier() -> HeadKind:
    """How decoders classify a text."""
    return HeadKind(
        "ForSequenceClassification",
        lambda config: LastTokenClassifier(config.d_model, config.num_labels),
        lambda config: (Rule("score.weight", "classifier.weight"),),
    )


def token_classifier(theirs: str = "classifier") -> HeadKind:
    """A class for every token."""
    return HeadKind(
        "ForTokenClassification",
        lambda config: Classifier(config.d_model, config.num_labels, head_dropout(config)),
        lambda config: both(theirs, "classifier"),
    )


def span_head(dropout: Callable[[Any], float] = lambda config: 0.0) -> HeadKind:
    """The first and the last token of an answer."""
    return HeadKind(
        "ForQuestionAnswering",
        lambda config: SpanHead(config.d_model, dropout(config)),
        lambda config: both("qa_outputs", "ends"),
    )


def head_dropout(config: Any) -> float:
    """A classifier's dropout: its own, or the model's."""
    own = getattr(config, "head_dropout", None)
    return getattr(config, "dropout", 0.0) if own is None else own


def several(suffix: str, parts: Mapping[str, HeadKind]) -> HeadKind:
    """Several heads that a checkpoint holds side by side (BERT's two of pretraining)."""

    def build(config: Any) -> Heads:
        return Heads({name: kind.build(config) for name, kind in parts.items()})

    def rules(config: Any) -> Rules:
        found = [within(f"{name}.", kind.rules(config)) for name, kind in parts.items()]
        return tuple(rule for some in found for rule in some)

    return HeadKind(suffix, build, rules)


def multitask(heads: Mapping[str, HeadKind]) -> HeadKind:
    """The heads that `config.tasks` lists, each with labels of its own.

    Hugging Face has no such class; a checkpoint keeps them under `heads.NAME.`.
    """

    def parts(config: Any) -> Mapping[str, tuple[HeadKind, Any]]:
        if not config.tasks:
            raise ConfigError(
                "head 'multitask' needs tasks, such as {'topic': {'head': 'classify'}}"
            )
        return {name: _task(heads, config, name, task) for name, task in config.tasks.items()}

    def build(config: Any) -> Heads:
        return Heads({name: kind.build(own) for name, (kind, own) in parts(config).items()})

    def rules(config: Any) -> Rules:
        found: list[Rule | Dropped | Tied] = []
        for name, (kind, own) in parts(config).items():
            found += within(f"{name}.", kind.rules(own), f"heads.{name}.")
        return tuple(found)

    return HeadKind("ForMultiTask", build, rules)


def _task(
    heads: Mapping[str, HeadKind], config: Any, name: str, task: Mapping[str, Any]
) -> tuple[HeadKind, Any]:
    if not isinstance(task, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"task {name!r} is {task!r}; write {{'head': ...}}, with labels if any")
    head = task.get("head")
    if head is None or head not in heads:
        raise ConfigError(f"task {name!r} asks for head {head!r}; choose from {', '.join(heads)}")
    if not name.isidentifier() or hasattr(nn.ModuleDict, name):
        raise ConfigError(f"a task cannot be called {name!r}; use another name, of letters")
    labels = task.get("labels")
    own = replace(
        config,
        labels=None if labels is None else tuple(labels),
        problem=task.get("problem"),
        tasks=None,
    )
    return heads[head], own


def within(ours: str, rules: Rules, theirs: str = "") -> Sequence[Rule | Dropped | Tied]:
    """The same rules for a part that stands under a name here, and under one there."""
    return [_moved(rule, ours, theirs) for rule in rules]


def _moved(rule: Rule | Dropped | Tied, ours: str, theirs: str) -> Rule | Dropped | Tied:
    if not isinstance(rule, Rule):
        return replace(rule, theirs=theirs + rule.theirs)
    if isinstance(rule.ours, str):
        moved = ours + rule.ours
    else:
        moved = tuple(ours + name for name in rule.ours)
    return replace(rule, theirs=theirs + rule.theirs, ours=moved)


EMBED = HeadKind("Model", lambda config: Pooling())
"""One vector a text; how it is pooled stands beside the model, not in its config."""

CAUSAL_HEADS: Mapping[str, HeadKind] = {
    "lm": language(),
    "classify": last_token_classifier(),
    "tag": token_classifier("score"),
}
"""What transformers' newer decoders can carry."""
