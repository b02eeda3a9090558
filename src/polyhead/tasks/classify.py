"""Classes of texts, of pairs of texts, and of images. B rows, C classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.nn.mode import evaluating
from polyhead.tasks.batching import MOST_TOKENS, Progress, batches, inputs, longest
from polyhead.tasks.fit import Fit, fit, kind_of
from polyhead.text.tokenizer import Tokenizer

IMAGES_A_BATCH = 16


@dataclass(frozen=True)
class Classification:
    """What a model says of one text or image.

    label, score: the likeliest class. scores: of every class, in the model's order: probabilities
    that sum to 1; where several labels may hold, of each on its own; of a regression, its values.
    is_cut: whether the text was longer than the model, so that its end was not read.
    """

    label: str
    score: float
    scores: Mapping[str, float]
    is_cut: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Where several labels may hold: those that are more likely than not."""
        return tuple(label for label, score in self.scores.items() if score >= 0.5)


class Classifier:
    """Texts to classes: `Classifier(model, tokenizer)(["so good", "so bad"])`.

    head: which one, where the model has several. Errors: ConfigError for a model that does not
    classify texts.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, head: str | None = None) -> None:
        if kind_of(model) in ("vision", "two towers"):
            raise ConfigError(f"{model.config.model_type} reads images; use ImageClassifier")
        self.model, self.tokenizer = model, tokenizer
        self.fit = fit(model, "classify", head)

    def __call__(
        self,
        texts: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> list[Classification]:
        """One result a text, in their order; what is longer than the model loses its end.

        text_pairs: second texts, one for each. most_tokens: of a batch, padding included. Errors:
        DataError for texts that are empty or no strings.
        """
        texts = [texts] if isinstance(texts, str) else texts
        pairs = [text_pairs] if isinstance(text_pairs, str) else text_pairs
        found: dict[int, Classification] = {}
        most = longest(self.model)
        with evaluating(self.model), torch.inference_mode():
            for batch in batches(
                self.tokenizer,
                texts,
                pairs,
                max_len=most,
                most_tokens=most_tokens,
                progress=progress,
            ):
                # What is not passed, a model with one head need not know of.
                named = {} if self.fit.name is None else {"head": self.fit.name}
                logits = self.model(**inputs(self.model, batch), **named)
                rows = classifications(logits, self.fit)
                found.update(zip(batch.text_index.tolist(), rows, strict=True))
                for text in batch.text_index[batch.lengths == most].tolist():
                    given = texts[text : text + 1], pairs and pairs[text : text + 1]
                    is_cut = int(self.tokenizer(*given).lengths) > (most or 0)
                    found[text] = replace(found[text], is_cut=is_cut)
        return [found[i] for i in range(len(texts))]


class ImageClassifier:
    """Images to classes: `ImageClassifier(model, Processor.load(directory))(["cat.jpg"])`."""

    def __init__(self, model: TaskModel, processor: Processor) -> None:
        if kind_of(model) != "vision":
            raise ConfigError(f"{model.config.model_type} reads texts; use Classifier")
        self.model, self.processor = model, processor
        self.fit = fit(model, "classify")

    def __call__(
        self, images: Any, *, batch_size: int = IMAGES_A_BATCH, progress: Progress | None = None
    ) -> list[Classification]:
        """One result an image, in their order; an image is what the processor takes."""
        found: list[Classification] = []
        with evaluating(self.model), torch.inference_mode():
            for pixels in image_batches(self.model, self.processor, images, batch_size, progress):
                found += classifications(self.model(pixels), self.fit)
        return found


class ZeroShotClassifier:
    """Images to labels of one's own, by CLIP.

    `ZeroShotClassifier(model, tokenizer, processor)(images, ["a cat", "a dog"])`. Errors:
    ConfigError for a model without both towers.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, processor: Processor) -> None:
        if kind_of(model) != "two towers":
            raise ConfigError(
                f"{model.config.model_type} does not compare texts with images; labels of one's "
                "own need a clip"
            )
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    def __call__(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        template: str = "This is a photo of {}.",
        batch_size: int = IMAGES_A_BATCH,
        progress: Progress | None = None,
    ) -> list[Classification]:
        """One result an image, in their order. template: the sentence that a label stands in."""
        if len(labels) < 2 or isinstance(labels, str):
            raise DataError("two or more labels are needed to choose from")
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no {{}} for the label to stand in")
        rows = self.tokenizer([template.replace("{}", label) for label in labels])
        self._check(labels, rows.attention_mask.sum(1).tolist())
        rows = rows.to(self.model.device)
        chosen = Fit(None, tuple(labels), None)
        found: list[Classification] = []
        with evaluating(self.model), torch.inference_mode():
            texts = self.model.encode_text(rows.input_ids, rows.attention_mask)
            texts = texts / texts.norm(dim=-1, keepdim=True)
            for pixels in image_batches(self.model, self.processor, images, batch_size, progress):
                seen = self.model.encode_image(pixels)
                seen = seen / seen.norm(dim=-1, keepdim=True)
                found += classifications(self.model.answer(texts @ seen.T).T, chosen)
        return found

    def _check(self, labels: Sequence[str], sizes: Sequence[int]) -> None:
        """DataError for a label that says nothing, or more than the model reads."""
        most = getattr(self.model.config, "text").max_seq_len  # noqa: B009
        for label, size in zip(labels, sizes, strict=True):
            if not label.strip():
                raise DataError("a label is empty; name what is to be told apart")
            if size > most:
                raise DataError(
                    f"the label {label[:40]!r} makes {size} tokens, and the model reads {most}; "
                    "shorten it"
                )


def classifications(logits: Tensor, fitted: Fit) -> list[Classification]:
    """Logits `[B, C]` read as the problem says, which is as transformers reads them."""
    logits = logits.float()
    if fitted.problem == "regression":
        scores = logits
    elif fitted.problem == "multi_label_classification" or len(fitted.labels) == 1:
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    rows: list[list[float]] = scores.tolist()
    found: list[Classification] = []
    for row in rows:
        best = max(range(len(row)), key=row.__getitem__)
        named = dict(zip(fitted.labels, row, strict=True))
        found.append(Classification(fitted.labels[best], row[best], named))
    return found


def image_batches(
    model: TaskModel,
    processor: Processor,
    images: Any,
    batch_size: int,
    progress: Progress | None,
) -> Any:
    """Pixel values of so many images at a time, on the model's device and in its type."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    many = images if isinstance(images, list | tuple) else [images]
    for first in range(0, len(many), batch_size):
        some = list(many[first : first + batch_size])
        yield processor(some).to(model.device, model.dtype)
        if progress is not None:
            progress(first + len(some), len(many))
