"""What a model is called with to be looked into: its texts, its image, and their tokens by name.

T tokens, C channels.
"""

import base64
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import cast

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.explain.heads import Text
from polyhead.explain.page import Side
from polyhead.explain.stacks import Reader, Tokens, patches
from polyhead.generate.seq2seq import start_id
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.nn.patches import PatchEmbedding
from polyhead.tasks.batching import check_texts, inputs
from polyhead.tasks.fit import kind_of
from polyhead.tasks.translate import Translator
from polyhead.text.pieces import is_mark, pieces
from polyhead.text.tokenizer import Tokenizer

READ_IMAGES = ("vision", "two towers", "image-text")
_READS = {
    "decoder": "one text",
    "encoder": "one text, or two",
    "encoder-decoder": "a text, and what it writes as the second",
    "vision": "an image alone",
    "two towers": "a text and an image",
    "image-text": "a text and an image",
}


def reader_of(
    model: TaskModel,
    tokenizer: Tokenizer | None,
    text: str | None,
    second: str | None,
    image: object,
    processor: Processor | None,
    max_tokens: int | None = None,
) -> Reader:
    """The inputs of one call, and what each part of the model sees of them.

    ConfigError for what a model of its kind does not read or lacks; DataError for empty texts.
    """
    kind = kind_of(model)
    wants_text, wants_image = kind != "vision", kind in READ_IMAGES
    wrong = [
        (text is None and wants_text, "give it a text"),
        (text is not None and not wants_text, "leave the text out"),
        (image is None and kind in ("vision", "two towers"), "give it an image"),
        (image is not None and not wants_image, "leave the image out"),
        (second is not None and kind not in ("encoder", "encoder-decoder"), "leave the second out"),
        (text is not None and tokenizer is None, "give its tokenizer too"),
        (image is not None and processor is None, "give its processor too"),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            reads = _READS.get(kind, kind)
            raise ConfigError(f"{model.config.model_type} reads {reads}; {what}")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}; a text needs 2 or more")
    pixels = None if processor is None or image is None else processor(image).to(model.device)
    if kind == "vision":
        assert pixels is not None
        assert processor is not None
        return Reader(pixels, {"": _patches(model, pixels, processor)})
    assert text is not None
    assert tokenizer is not None
    check_texts([text])
    if kind == "encoder-decoder":
        return _of_pair(model, tokenizer, text, second, max_tokens)
    if kind == "image-text":
        return _of_image_text(model, tokenizer, text, pixels, processor, max_tokens)
    given = _encoded(model, tokenizer, text, second, max_tokens)
    words = _words(tokenizer, given["input_ids"])
    if pixels is None or processor is None:
        return Reader(given, {"": words})
    parts = {"text": words, "vision": _patches(model, pixels, processor)}
    return Reader({**given, "pixel_values": pixels}, parts)


def _encoded(
    model: TaskModel, tokenizer: Tokenizer, text: str, second: str | None, most: int | None
) -> dict[str, Tensor]:
    if second is not None:
        check_texts([second], "second text")
    limits = [limit for limit in (most, model.config.max_tokens) if limit is not None]
    batch = tokenizer(
        [text],
        None if second is None else [second],
        max_len=None if most is None else min(limits),
        truncate=most is not None,
    )
    _check_length(batch.input_ids.shape[1])
    return inputs(model, batch)


def _of_pair(
    model: TaskModel, tokenizer: Tokenizer, text: str, second: str | None, most: int | None
) -> Reader:
    start = start_id(model, tokenizer)
    if start is None:
        raise ConfigError("the checkpoint says no decoder_start_token_id; so nothing can be read")
    given = _encoded(model, tokenizer, text, None, most)
    if second is None:
        (answer,) = Translator(model, tokenizer)([text], num_beams=1)
        written = list(answer.token_ids)
    else:
        check_texts([second], "second text")
        written = tokenizer.encode_targets([second])[0]
    decoded = torch.tensor([[start, *written][:most]], device=model.device)
    source, target = _words(tokenizer, given["input_ids"]), _words(tokenizer, decoded)
    named = {**given, "decoder_input_ids": decoded}
    return Reader(named, {"encoder": source, "decoder": target}, source)


def _of_image_text(
    model: TaskModel,
    tokenizer: Tokenizer,
    text: str,
    pixels: Tensor | None,
    processor: Processor | None,
    most: int | None,
) -> Reader:
    """The text's image token stands for all that the decoder reads of the image."""
    image_id = int(getattr(model.config, "image_token_id"))  # noqa: B009
    ids = tokenizer.encode(text)[:most]
    if pixels is None or processor is None:
        given = torch.tensor([ids], device=model.device)
        return Reader(given, {"": _words(tokenizer, given)})
    if image_id not in ids:
        ids = [image_id, *ids]
    if ids.count(image_id) > 1:
        raise DataError(f"the text has {ids.count(image_id)} image tokens; write one, or none")
    features = cast(Tensor, model.backbone.image_features(pixels))  # type: ignore[operator]
    at, count = ids.index(image_id), features.shape[1]
    row = torch.tensor([[*ids[:at], *[image_id] * count, *ids[at + 1 :]]], device=model.device)
    tower = _patches(model, pixels, processor)
    picture = tower.side.picture
    assert picture is not None
    words = _words(tokenizer, row)
    names = list(words.side.tokens)
    # What stands before the patches is read as well, or left out.
    before = count - picture.rows * picture.columns
    if before in (0, picture.first):
        names[at : at + count] = tower.side.tokens[picture.first - before :]
        side = Side(names, replace(picture, first=at + before))
        words = Tokens(side, words.text)
    named = {"input_ids": row, "pixel_values": pixels}
    return Reader(named, {"vision": tower, "language": words})


def _words(tokenizer: Tokenizer, ids: Tensor) -> Tokens:
    row = ids[0].tolist()
    names = pieces(tokenizer, row)
    marks = [is_mark(tokenizer, i) for i in row]
    delimiters = torch.tensor([marks], device=ids.device)
    return Tokens(Side(names), Text(ids, torch.ones_like(ids, dtype=torch.bool), delimiters))


def _patches(model: TaskModel, pixels: Tensor, processor: Processor) -> Tokens:
    if len(pixels) != 1:
        raise DataError(f"{len(pixels)} images were given; a page shows one")
    embedding = next((p for p in model.modules() if isinstance(p, PatchEmbedding)), None)
    if embedding is None:
        raise ConfigError(f"{model.config.model_type} has no patches; capture its weights instead")
    grid = embedding.grid(pixels)
    tokens = _before(model)
    return patches(_source(pixels[0].cpu(), processor), grid, tokens)


def _before(model: TaskModel) -> Sequence[str]:
    """What stands before the patches."""
    tower = getattr(model.backbone, "vision", model.backbone)
    names = {"class_token": "[CLS]", "distillation_token": "[DIST]"}
    return [name for own, name in names.items() if hasattr(tower, own)]


def _source(pixels: Tensor, processor: Processor) -> str:
    """What the model sees of an image, as it came, for a page: a data URI."""
    from polyhead.images.pillow import pillow

    values = pixels.float()
    if processor.norms:
        mean, std = (
            torch.tensor(given)[:, None, None] for given in (processor.mean, processor.std)
        )
        values = values * std + mean
    values = values if processor.scale is None else values / processor.scale
    shown = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    image = pillow().Image.fromarray(shown.squeeze(-1) if shown.shape[-1] == 1 else shown)
    file = BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _check_length(count: int) -> None:
    if count < 2:
        raise DataError("the text is one token; give it more, so that there is something to see")
