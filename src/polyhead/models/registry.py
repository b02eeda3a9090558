"""The families: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models import bigram, gpt2, llama, moe, transformer
from polyhead.models.config import Config, Row
from polyhead.models.keys import Rules
from polyhead.models.llama_config import LlamaConfig
from polyhead.models.transformer_parts import TransformerConfig


@dataclass(frozen=True)
class Family:
    """How the models of one file are configured, built and mapped to checkpoints.

    rules: the map of the backbone, and of the pooler under `pooler.`; heads bring their own.
    """

    config: type[Config]
    backbone: Callable[[Any], nn.Module]
    rules: Callable[[Any], Rules]

    def row(self, model_type: str) -> Row:
        """What the type says beyond the config."""
        return self.config.row(model_type)


FAMILIES = (
    Family(bigram.BigramConfig, bigram.Bigram, bigram.rules),
    Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.rules),
    Family(LlamaConfig, llama.Llama, llama.rules),
    Family(moe.MoEConfig, moe.MoE, moe.rules),
    Family(TransformerConfig, transformer.Transformer, transformer.rules),
)


def families() -> tuple[str, ...]:
    """The model types that can be built and loaded."""
    return tuple(row.model_type for family in FAMILIES for row in family.config.rows())


def family_of(model_type: str) -> Family:
    """The family of a model type; raises ConfigError for one that is not known."""
    for family in FAMILIES:
        if any(row.model_type == model_type for row in family.config.rows()):
            return family
    raise ConfigError(
        f"model_type {model_type!r} is not supported; Polyhead knows {', '.join(families())}"
    )
