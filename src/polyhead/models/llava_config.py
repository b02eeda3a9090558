"""LLaVA's configuration: an image tower's, a decoder's, and what joins them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from polyhead.errors import ConfigError
from polyhead.models.activations import read_activation, write_activation
from polyhead.models.config import JSON, Config, Row, hf
from polyhead.models.heads import HeadKind
from polyhead.models.keys import Rule, Rules, Tied
from polyhead.models.nested import class_of, made_part, part_rules, read_part, write_part
from polyhead.nn.head import LanguageHead

TOWERS = ("clip_vision_model", "vit", "deit", "dinov2")
"""Image models whose layers all see the same tokens, the class token first."""

# What transformers takes a tower to be of which a file says nothing.
UNSAID_TOWER: JSON = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _sizes(vocab_size: int, intermediate_size: int) -> JSON:
    """The sizes of a decoder of seven billion weights."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 4096,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }


# The sizes that these types have in transformers where a file leaves them out, as LLaVA 1.5 does.
UNSAID_SIZES: Mapping[str, JSON] = {
    "llama": _sizes(32000, 11008),
    "mistral": _sizes(32000, 14336),
    "mixtral": _sizes(32000, 14336),
    "qwen2": _sizes(151936, 22016),
    "qwen3": _sizes(151936, 22016),
}


def _read_tower(found: JSON | None) -> Config:
    said = UNSAID_TOWER if found is None else found
    kind = said.get("model_type", "clip_vision_model")
    return read_part(class_of(kind), kind, said)


def _read_decoder(found: JSON | None) -> Config:
    kind = (found or {}).get("model_type", "llama")
    return read_part(class_of(kind), kind, {**UNSAID_SIZES.get(kind, {}), **(found or {})})


def _made(value: Config | Mapping[str, Any], default_type: str) -> Config:
    """A part's config as it is, or from its `model_type` and its fields."""
    if isinstance(value, Config):
        return value
    fields = dict(value)
    kind = fields.pop("model_type", default_type)
    return made_part(class_of(kind), kind, fields)


def _read_layers(found: int | list[int]) -> tuple[int, ...]:
    return (found,) if isinstance(found, int) else tuple(found)


def _write_layers(layers: tuple[int, ...]) -> int | list[int]:
    return layers[0] if len(layers) == 1 else list(layers)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(Config):
    """A decoder that reads images through a tower's eyes.

    text, vision: a config of another family, or its `model_type` and fields.
    feature_layers: the tower's states that are read side by side: 0 is what its first layer sees,
    -1 what its last one gives. keep: "full" for all tokens, "default" without the class token.
    image_seq_len: tokens of an image, which a processor writes into the text.
    """

    kind: ClassVar[str] = "image-text"

    text: Config = hf("text_config", read=_read_decoder, write=write_part)  # noqa: RUF009
    vision: Config = hf("vision_config", read=_read_tower, write=write_part)  # noqa: RUF009
    image_token_id: int = hf("image_token_index", "image_token_id", default=32000)
    image_seq_len: int = hf("image_seq_length", default=576)
    feature_layers: tuple[int, ...] = hf(
        "vision_feature_layer", default=(-2,), read=_read_layers, write=_write_layers
    )
    keep: Literal["default", "full"] = hf("vision_feature_select_strategy", default="default")
    activation: str = hf(
        "projector_hidden_act", default="gelu", read=read_activation, write=write_activation
    )
    projector_bias: bool = hf("multimodal_projector_bias", default=True)
    tie_embeddings: bool = hf("tie_word_embeddings", default=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _made(self.text, "llama"))
        object.__setattr__(self, "vision", _made(self.vision, "clip_vision_model"))
        # Old files say it of the decoder alone.
        tied = self.tie_embeddings or getattr(self.text, "tie_embeddings", False)
        object.__setattr__(self, "tie_embeddings", tied)
        super().__post_init__()
        if self.vision.model_type not in TOWERS:
            raise ConfigError(
                f"vision_config is of the type {self.vision.model_type!r}; llava takes one of "
                f"{', '.join(TOWERS)}"
            )
        if getattr(self.text, "kind", "decoder") != "decoder":
            raise ConfigError(
                f"text_config is of the type {self.text.model_type!r}, not a decoder; use one "
                "such as llama"
            )
        depth = getattr(self.vision, "num_layers")  # noqa: B009
        for layer in self.feature_layers:
            if not -depth - 1 <= layer <= depth:
                raise ConfigError(
                    f"vision_feature_layer is {layer}; a tower of {depth} layers has the states "
                    f"{-depth - 1} to {depth}"
                )
        if not self.feature_layers:
            raise ConfigError("vision_feature_layer is empty; name one layer or more")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return (ROW,)

    def untied(self) -> Self:
        return replace(self, tie_embeddings=False, text=self.text.untied())

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image of the tower's own size."""
        tower: Any = self.vision
        if tower.model_type == "clip_vision_model":
            tokens = 1 + tower.num_patches
        else:
            tokens = 1 + tower.is_distilled + math.prod(tower.grid)
        return tokens - (self.keep == "default")

    def with_room(self, ids: Sequence[int]) -> list[int]:
        """Ids with each image token as often as an image has features."""
        times = {self.image_token_id: self.tokens_per_image}
        return [token for token in ids for _ in range(times.get(token, 1))]

    @property
    def vocab_size(self) -> int:
        """The decoder's."""
        return getattr(self.text, "vocab_size")  # noqa: B009

    @property
    def d_model(self) -> int:
        """The decoder's."""
        return getattr(self.text, "d_model")  # noqa: B009

    @property
    def num_layers(self) -> int:
        """The decoder's."""
        return getattr(self.text, "num_layers")  # noqa: B009

    @property
    def max_seq_len(self) -> int:
        """The decoder's."""
        return getattr(self.text, "max_seq_len")  # noqa: B009


def text_rules(config: LlavaConfig) -> Rules:
    """The checkpoint map of the decoder."""
    return part_rules(config.text, "language", "language_model.model.")


def _head_rules(config: LlavaConfig) -> Rules:
    head = "language_model.lm_head.weight"
    if not config.tie_embeddings:
        return (Rule(head, "weight"),)
    embedding = next(
        rule.theirs
        for rule in text_rules(config)
        if isinstance(rule, Rule) and rule.ours == "language.embedding.weight"
    )
    return (Tied(head, embedding),)


ROW = Row(
    "llava",
    "Llava",
    heads={
        "lm": HeadKind(
            "ForConditionalGeneration",
            lambda config: LanguageHead(config.d_model, config.vocab_size),
            _head_rules,
        )
    },
    absent={"text_config": {}, "vision_config": None},
    harmless=frozenset({"ignore_index", "vocab_size"}),
    # What transformers 4.52 to 4.57 hold in memory, and what came before.
    renamed={
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.",
        "vision_tower.vision_model.": "vision_tower.",
    },
)
