"""Texts of any number and length as batches of rows of like length. B rows, T tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.prompts import check_ids
from polyhead.models.model import TaskModel
from polyhead.text.batch import Batch
from polyhead.text.tokenizer import Tokenizer, check_text

MOST_TOKENS = 4096
"""Of a batch, padding included; a single longer row is a batch of its own."""
WINDOW = 384
"""Tokens of a window of a long text, as transformers' pipelines take."""

Progress = Callable[[int, int], None]
"""Called with the texts that are done, and with all."""

# What is tokenised at once: enough for its threads, little beside the model.
_MOST_TEXTS, _MOST_CHARACTERS = 512, 1_000_000


def batches(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_len: int | None,
    stride: int | None = None,
    most_tokens: int = MOST_TOKENS,
    progress: Progress | None = None,
) -> Iterator[Batch]:
    """Rows of like length together, the longest first; `text_index` says whose each is.

    max_len: a longer text loses its end, or with `stride` is cut into windows that share so many
    tokens; a text's windows follow one another. Errors: DataError for texts that are empty.
    """
    if most_tokens < 1:
        raise ConfigError(f"most_tokens is {most_tokens}; it must be at least 1")
    check_texts(texts)
    if pairs is not None:
        check_texts(pairs, "second text")
    characters = [len(text) for text in texts]
    if pairs is not None:
        if len(pairs) != len(texts):
            raise DataError(f"{len(texts)} texts but {len(pairs)} second texts; give one for each")
        characters = [a + len(b) for a, b in zip(characters, pairs, strict=True)]
    done = 0
    for some in _chunks(characters):
        encoded = tokenizer(
            [texts[i] for i in some],
            None if pairs is None else [pairs[i] for i in some],
            max_len=max_len,
            truncate=max_len is not None and stride is None,
            stride=None if max_len is None else stride,
        )
        owners = torch.tensor(some)[encoded.text_index]
        lengths = encoded.lengths
        # Stable, so that a text's windows, of which the last is the shortest, keep their order.
        order = lengths.argsort(descending=True, stable=True)
        for rows in _rows(lengths[order].tolist(), most_tokens):
            yield _part(encoded, owners, order[rows.start : rows.stop])
            if progress is not None:
                progress(done + len(some) * rows.stop // len(order), len(texts))
        done += len(some)


def inputs(model: TaskModel, batch: Batch) -> dict[str, Tensor]:
    """What a text model is called with. Errors: DataError for rows that it cannot take."""
    vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
    check_ids([int(batch.input_ids.max())], vocab_size)
    most = model.config.max_tokens
    if most is not None and batch.input_ids.shape[1] > most:
        longest = int(batch.lengths.argmax())
        raise DataError(
            f"text {int(batch.text_index[longest])} has {int(batch.lengths[longest])} tokens and "
            f"the model takes {most}; shorten it"
        )
    names = ["input_ids", "attention_mask"]
    # Models of one type or none would have no row for what a tokenizer numbers.
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return {name: getattr(batch, name).to(model.device) for name in names}


def longest(model: TaskModel, asked: int | None = None) -> int | None:
    """Tokens that a row may have: the window asked for, or all that the model takes."""
    most = model.config.max_tokens
    if asked is None or most is None:
        return most if asked is None else asked
    if not 1 <= asked <= most:
        raise ConfigError(f"window is {asked}; it must be from 1 to the model's {most} tokens")
    return asked


def check_texts(texts: Sequence[str], name: str = "text") -> None:
    """DataError for one that is no string, is not Unicode, or says nothing."""
    for i, text in enumerate(texts):
        check_text(text, f"{name} {i}")
        if not text.strip():
            raise DataError(f"{name} {i} is empty; leave it out, or give it words")


def _chunks(characters: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of like length, those that are tokenised together; the longest first."""
    some: list[int] = []
    total = 0
    for i in sorted(range(len(characters)), key=lambda i: -characters[i]):
        if some and (len(some) == _MOST_TEXTS or total + characters[i] > _MOST_CHARACTERS):
            yield some
            some, total = [], 0
        some.append(i)
        total += characters[i]
    if some:
        yield some


def _rows(lengths: Sequence[int], most_tokens: int) -> Iterator[range]:
    """Which of rows of falling lengths make a batch."""
    first = 0
    while first < len(lengths):
        rows = max(1, most_tokens // max(1, lengths[first]))
        yield range(first, min(first + rows, len(lengths)))
        first += rows


def _part(batch: Batch, owners: Tensor, rows: Tensor) -> Batch:
    """Some rows, as wide as the longest of them."""
    width = int(batch.lengths[rows].max())
    named = {item.name: getattr(batch, item.name)[rows] for item in fields(Batch)}
    cut = {name: value[:, :width] if value.ndim > 1 else value for name, value in named.items()}
    return Batch(**{**cut, "text_index": owners[rows]})
