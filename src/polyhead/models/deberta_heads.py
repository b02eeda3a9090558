"""DeBERTa's heads, and under which names a checkpoint keeps them."""

from collections.abc import Mapping
from typing import Any

from polyhead.errors import ConfigError
from polyhead.models.bert_heads import vocabulary
from polyhead.models.heads import HeadKind, both, head_dropout, span_head, token_classifier
from polyhead.models.keys import Rule, Rules
from polyhead.nn.deberta_head import ContextClassifier, EnhancedMaskedHead, ReplacedTokenHead
from polyhead.nn.head import MaskedLanguageHead

DECODERS = ("enhanced", "plain", "legacy")


def masked_language(config: Any) -> MaskedLanguageHead:
    """The masked-LM head that `config.decoder` names."""
    if config.decoder != "legacy" and not config.tie_embeddings:
        raise ConfigError(
            f"decoder {config.decoder!r} always reads the embedding; use tie_embeddings=True, or "
            "decoder='legacy'"
        )
    make = EnhancedMaskedHead if config.decoder == "enhanced" else MaskedLanguageHead
    return make(
        config.d_model,
        config.vocab_size,
        config.activation,
        config.norm_eps,
        config.table_width,
    )


def _masked_rules(config: Any) -> Rules:
    if config.decoder == "legacy":
        top, embedding = "cls.predictions", "deberta.embeddings.word_embeddings.weight"
        return (
            *both(f"{top}.transform.dense", "dense"),
            *both(f"{top}.transform.LayerNorm", "norm"),
            *vocabulary(config, embedding, f"{top}.decoder", f"{top}.bias"),
        )
    top = "lm_predictions.lm_head"
    return (
        *both(f"{top}.dense", "dense"),
        *both(f"{top}.LayerNorm", "norm"),
        Rule(f"{top}.bias", "decoder.bias"),
    )


def _replaced_token(config: Any) -> ReplacedTokenHead:
    return ReplacedTokenHead(config.d_model, config.activation, config.norm_eps)


def _replaced_token_rules(config: Any) -> Rules:
    parts = {"dense": "dense", "LayerNorm": "norm", "classifier": "classifier"}
    found = (both(f"mask_predictions.{name}", own) for name, own in parts.items())
    return tuple(rule for pair in found for rule in pair)


def _classifier(config: Any) -> ContextClassifier:
    return ContextClassifier(
        config.d_model,
        config.num_labels,
        config.pooler_activation,
        head_dropout(config),
        config.pooler_dropout,
    )


HEADS: Mapping[str, HeadKind] = {
    "lm": HeadKind("ForMaskedLM", masked_language, _masked_rules),
    "classify": HeadKind(
        "ForSequenceClassification",
        _classifier,
        lambda config: (*both("pooler.dense", "dense"), *both("classifier", "classifier")),
    ),
    "tag": token_classifier(),
    "answer": span_head(),
    # transformers has no class for it.
    "rtd": HeadKind("ForReplacedTokenDetection", _replaced_token, _replaced_token_rules),
}
