"""The heads of BERT, RoBERTa and DistilBERT."""

from collections.abc import Mapping
from typing import Any

from polyhead.models.heads import (
    HeadKind,
    both,
    head_dropout,
    several,
    span_head,
    token_classifier,
)
from polyhead.models.keys import Rule, Rules, Tied
from polyhead.nn.head import Classifier, FirstTokenClassifier, MaskedLanguageHead, Pooler


def tanh_pooler(config: Any) -> Pooler:
    """A dense layer and tanh on the first token."""
    return Pooler(config.d_model)


def masked_language(config: Any) -> MaskedLanguageHead:
    """A masked-LM head of the config's sizes; RoBERTa's is always a GELU."""
    activation = "gelu" if config.offset_by_padding else config.activation
    return MaskedLanguageHead(config.d_model, config.vocab_size, activation, config.norm_eps)


def vocabulary(config: Any, embedding: str, decoder: str, bias: str) -> Rules:
    """A decoder over the vocabulary whose bias also stands by itself.

    Tied, that one is read and written. Untied, the decoder's own is what counts.
    """
    if config.tie_embeddings:
        own, copy = Rule(bias, "decoder.bias"), Tied(f"{decoder}.bias", bias)
        return (own, copy, Tied(f"{decoder}.weight", embedding))
    copy = Tied(bias, f"{decoder}.bias", is_written=True)
    return (*both(decoder, "decoder"), copy)


def _bert_rules(config: Any) -> Rules:
    top, embedding = "cls.predictions", "bert.embeddings.word_embeddings.weight"
    return (
        *both(f"{top}.transform.dense", "dense"),
        *both(f"{top}.transform.LayerNorm", "norm"),
        *vocabulary(config, embedding, f"{top}.decoder", f"{top}.bias"),
    )


def _roberta_rules(config: Any) -> Rules:
    embedding = "roberta.embeddings.word_embeddings.weight"
    return (
        *both("lm_head.dense", "dense"),
        *both("lm_head.layer_norm", "norm"),
        *vocabulary(config, embedding, "lm_head.decoder", "lm_head.bias"),
    )


def _distilbert_rules(config: Any) -> Rules:
    embedding = "distilbert.embeddings.word_embeddings.weight"
    weight = Rule("vocab_projector.weight", "decoder.weight")
    return (
        *both("vocab_transform", "dense"),
        *both("vocab_layer_norm", "norm"),
        Rule("vocab_projector.bias", "decoder.bias"),
        Tied(weight.theirs, embedding) if config.tie_embeddings else weight,
    )


def _first_token(dense: str, classifier: str, activation: str) -> HeadKind:
    def build(config: Any) -> FirstTokenClassifier:
        dropout = head_dropout(config)
        return FirstTokenClassifier(config.d_model, config.num_labels, activation, dropout)

    rules = (*both(dense, "pooler.dense"), *both(classifier, "classifier"))
    return HeadKind("ForSequenceClassification", build, lambda config: rules)


def pooled_classifier(
    suffix: str = "ForSequenceClassification",
    theirs: str = "classifier",
    num_labels: int | None = None,
) -> HeadKind:
    """Classes of the pooled text; as many as the config names unless told."""

    def build(config: Any) -> Classifier:
        classes = config.num_labels if num_labels is None else num_labels
        return Classifier(config.d_model, classes, head_dropout(config), pooled=True)

    return HeadKind(suffix, build, lambda config: both(theirs, "classifier"))


_LM = HeadKind("ForMaskedLM", masked_language, _bert_rules)
_NSP = pooled_classifier("ForNextSentencePrediction", "cls.seq_relationship", 2)

BERT: Mapping[str, HeadKind] = {
    "lm": _LM,
    "classify": pooled_classifier(),
    "tag": token_classifier(),
    "answer": span_head(),
    "nsp": _NSP,
    "pretraining": several("ForPreTraining", {"lm": _LM, "nsp": _NSP}),
}
ROBERTA: Mapping[str, HeadKind] = {
    "lm": HeadKind("ForMaskedLM", masked_language, _roberta_rules),
    "classify": _first_token("classifier.dense", "classifier.out_proj", "tanh"),
    "tag": token_classifier(),
    "answer": span_head(),
}
DISTILBERT: Mapping[str, HeadKind] = {
    "lm": HeadKind("ForMaskedLM", masked_language, _distilbert_rules),
    "classify": _first_token("pre_classifier", "classifier", "relu"),
    "tag": token_classifier(),
    "answer": span_head(lambda config: config.dropout),
}
