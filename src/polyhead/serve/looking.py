"""A model that reads images: their classes, by its own names or by yours, and their vectors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.nn.mode import evaluating
from polyhead.serve.explaining import explained
from polyhead.serve.line import Line, Work
from polyhead.serve.reading import told_of
from polyhead.tasks.classify import (
    IMAGES_A_BATCH,
    ImageClassifier,
    ZeroShotClassifier,
    image_batches,
)
from polyhead.text.tokenizer import Tokenizer


class Looking(Line):
    """A ViT or a Swin, or, with a tokenizer, a CLIP."""

    is_not = "this model reads images: ask it for /classify"

    def __init__(
        self,
        model: TaskModel,
        processor: Processor,
        tokenizer: Tokenizer | None,
        flush: Callable[[], None],
    ) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        super().__init__(flush)

    def about(self) -> dict[str, Any]:
        """Its kind and its head."""
        return {
            "kind": "vision" if self.tokenizer is None else "two towers",
            "head": self.model.head_kind, "max_tokens": self.model.config.max_tokens,
            "parameters": self.model.num_parameters(),
        }  # fmt: skip

    def works(self) -> Mapping[str, Work]:
        """What it does, by name."""
        both = {"classify": self._classify, "explain": self._explain}
        return both if self.tokenizer is None else {**both, "embed": self._embed}

    def _classify(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        images = _images(given)
        if self.tokenizer is None:
            if given["labels"]:
                raise ConfigError("labels of your own are for a clip; this model has its own")
            found = ImageClassifier(self.model, self.processor)(images)
        else:
            zero = ZeroShotClassifier(self.model, self.tokenizer, self.processor)
            labels, template = given["labels"] or (), given["template"]
            found = zero(images, labels, **({"template": template} if template else {}))
        return {"data": [told_of(one) for one in found], "tokens": 0}

    def _explain(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return explained(self.model, self.tokenizer, self.processor, given)

    def _embed(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """A vector for each text, and after them one for each image, in one space."""
        assert self.tokenizer is not None
        found: list[Tensor] = []
        count = 0
        with evaluating(self.model), torch.inference_mode():
            if given["texts"]:
                rows = self.tokenizer(given["texts"], max_len=self._longest, truncate=True)
                rows, count = rows.to(self.model.device), int(rows.attention_mask.sum())
                found.append(self.model.encode_text(rows.input_ids, rows.attention_mask))
            if images := given["images"]:
                batches = image_batches(self.model, self.processor, images, IMAGES_A_BATCH, None)
                found += [self.model.encode_image(pixels) for pixels in batches]
        vectors = torch.cat(found).float()[:, : given["dimensions"]]
        return {"vectors": vectors.cpu().numpy(), "tokens": count}

    @property
    def _longest(self) -> int:
        return getattr(self.model.config, "text").max_seq_len  # noqa: B009


def _images(given: Mapping[str, Any]) -> Sequence[bytes]:
    if given["texts"]:
        raise ConfigError("this model reads images, and input is text; send images")
    if not given["images"]:
        raise ConfigError("this model reads images, and there is none; send images")
    return given["images"]
