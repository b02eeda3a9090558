"""LLaVA: a decoder that reads images as words (Liu et al. 2023; 2024).

An image tower's states, projected to the decoder's width, take the places of the image tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from polyhead.errors import DataError
from polyhead.models.heads import both
from polyhead.models.keys import Rules
from polyhead.models.llava_config import LlavaConfig, text_rules
from polyhead.models.nested import part_backbone, part_rules
from polyhead.nn.cache import Caches
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import activation_named
from polyhead.nn.mask import Mask, as_mask


class Tower(Protocol):
    """An image model whose layers can be run one by one."""

    layers: Sequence[nn.Module]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What the first layer sees, `[B, T, E]`."""
        ...


class Projector(nn.Module):
    """`second(activation(first(x)))`: the tower's width to the decoder's, `[..., E]`."""

    def __init__(self, width: int, d_model: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.first = nn.Linear(width, d_model, bias=bias)
        self.second = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)))


class Llava(nn.Module):
    """Token ids `[B, T]` and images `[N, C, height, width]` to hidden states `[B, T, E]`.

    The batch's image tokens, padding left out, are as many as the images' features, in their
    order. A row may have several images, or none.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        vision: Any = config.vision
        self.vision = part_backbone(vision)
        pooler = vision.row(vision.model_type).pooler
        # Checkpoints hold the tower's pooler, which nothing here reads.
        self.vision_pooler = None if pooler is None else pooler(vision)
        width = vision.d_model * len(config.feature_layers)
        self.projector = Projector(width, config.d_model, config.activation, config.projector_bias)
        self.language = part_backbone(config.text)

    @property
    def embedding(self) -> TokenEmbedding:
        """The decoder's."""
        return cast(TokenEmbedding, self.language.embedding)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | Mask | None = None,
        caches: Caches | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Without images it is the decoder. Counts that do not agree raise DataError."""
        x = self.embedding(input_ids)
        mask = as_mask(attention_mask, input_ids.shape)
        is_image = input_ids == self.config.image_token_id
        if mask.keep is not None:
            is_image = is_image & mask.keep
        if pixel_values is not None:
            features = self.image_features(pixel_values).flatten(0, 1).to(x.dtype)
            _check_count(is_image, len(features))
            x = x.masked_scatter(is_image[..., None], features)
        elif input_ids.shape[1] > 1:
            # One token alone is a step of decoding, which may draw any.
            _check_count(is_image, 0)
        return self.language(x, mask, caches, position_ids)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """What the decoder reads of each image, `[N, tokens, E]`."""
        states = layer_states(cast(Tower, self.vision), pixel_values, self.config.feature_layers)
        if self.config.keep == "default":
            states = [state[:, 1:] for state in states]
        return self.projector(torch.cat(states, dim=-1))

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        """Empty caches for `batch_size` rows of the decoder."""
        return cast(Any, self.language).make_caches(batch_size, max_len)


def layer_states(tower: Tower, pixel_values: Tensor, wanted: Sequence[int]) -> list[Tensor]:
    """A tower's states `[N, T, E]`, counted as in `LlavaConfig`; no layer runs that none needs."""
    numbers = [number % (len(tower.layers) + 1) for number in wanted]
    states = [tower.embed(pixel_values)]
    for layer in tower.layers[: max(numbers)]:
        states.append(layer(states[-1]))
    return [states[number] for number in numbers]


def _check_count(is_image: Tensor, num_features: int) -> None:
    if torch.compiler.is_compiling():
        return
    found = int(is_image.sum())
    if found != num_features:
        raise DataError(
            f"input_ids hold {found} image tokens and the images give {num_features} features; "
            "write one token into the text for each"
        )


def rules(config: LlavaConfig) -> Rules:
    """The checkpoint map: the towers' own, under their places here."""
    return (
        *part_rules(config.vision, "vision", "vision_tower."),
        *both("multi_modal_projector.linear_1", "projector.first"),
        *both("multi_modal_projector.linear_2", "projector.second"),
        *text_rules(config),
    )
