"""The families: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models import (
    albert,
    bert,
    bigram,
    clip,
    deberta,
    gpt2,
    llama,
    llava,
    lstm,
    marian,
    moe,
    swin,
    t5,
    transformer,
    vit,
    window_mlp,
)
from polyhead.models.clip_config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from polyhead.models.config import Config, Row
from polyhead.models.deberta_config import DebertaConfig
from polyhead.models.keys import Rules
from polyhead.models.llama_config import LlamaConfig
from polyhead.models.llava_config import LlavaConfig
from polyhead.models.transformer_parts import TransformerConfig
from polyhead.models.vit_config import DINOv2Config, ViTConfig


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
    Family(bert.BertConfig, bert.Bert, bert.rules),
    Family(albert.AlbertConfig, albert.Albert, albert.rules),
    Family(bigram.BigramConfig, bigram.Bigram, bigram.rules),
    Family(window_mlp.WindowMLPConfig, window_mlp.WindowMLP, window_mlp.rules),
    Family(lstm.LSTMConfig, lstm.LSTM, lstm.rules),
    Family(gpt2.GPT2Config, gpt2.GPT2, gpt2.rules),
    Family(LlamaConfig, llama.Llama, llama.rules),
    Family(moe.MoEConfig, moe.MoE, moe.rules),
    Family(TransformerConfig, transformer.Transformer, transformer.rules),
    Family(marian.MarianConfig, marian.Marian, marian.rules),
    Family(t5.T5Config, t5.T5, t5.rules),
    Family(DebertaConfig, deberta.Deberta, deberta.rules),
    Family(ViTConfig, vit.ViT, vit.rules),
    Family(DINOv2Config, vit.ViT, vit.rules),
    Family(swin.SwinConfig, swin.Swin, swin.rules),
    Family(CLIPConfig, clip.CLIP, clip.rules),
    Family(CLIPTextConfig, clip.CLIPText, clip.text_rules),
    Family(CLIPVisionConfig, clip.CLIPVision, clip.vision_rules),
    Family(LlavaConfig, llava.Llava, llava.rules),
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
