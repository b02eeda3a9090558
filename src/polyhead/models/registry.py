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
from polyhead.nn.head import LanguageHead


def language_head(config: Any) -> LanguageHead:
    """A head of the config's sizes."""
    return LanguageHead(config.d_model, config.vocab_size)


@dataclass(frozen=True)
class Family:
    """How the models of one file are configured, built and mapped to checkpoints.

    prefix: what stands before a backbone's tensors in a checkpoint that has a head.
    """

    config: type[Config]
    backbone: Callable[[Any], nn.Module]
    rules: Callable[[Any], Rules]
    prefix: str
    head: Callable[[Any], nn.Module | None] = language_head

    def row(self, model_type: str) -> Row:
        """What the type says beyond the config."""
        return self.config.row(model_type)

    def headless(self, model_type: str) -> str:
        """Hugging Face's class for the backbone alone."""
        with_head = self.row(model_type).architecture
        return with_head.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


FAMILIES = (
    Family(bigram.BigramConfig, bigram.Bigram, bigram.rules, bigram.PREFIX),
    Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.rules, gpt2.PREFIX),
    Family(LlamaConfig, llama.Llama, llama.rules, llama.PREFIX),
    Family(moe.MoEConfig, moe.MoE, moe.rules, moe.PREFIX),
    Family(TransformerConfig, transformer.Transformer, transformer.rules, transformer.PREFIX),
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
