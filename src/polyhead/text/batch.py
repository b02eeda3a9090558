"""Encoded texts as rectangular tensors: padding on the right, cutting, and windows.

Legend: B rows, T tokens of the longest row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError


@dataclass(frozen=True)
class Batch:
    """Rows of ids, padded on the right. All tensors are int64 and live on one device.

    input_ids       [B, T]
    attention_mask  [B, T]     1 where a token counts
    token_type_ids  [B, T]     0 for the first text, 1 for the second, as the tokenizer frames them
    offsets         [B, T, 2]  first and last + 1 character of the token in its text; 0, 0 if none
    sequence_ids    [B, T]     0 first text, 1 second, -1 special or padding
    word_ids        [B, T]     the word of its text that the token is of, as the tokenizer cuts
                               words; -1 special or padding
    text_index      [B]        which of the given texts the row is (a window) of
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    offsets: Tensor
    sequence_ids: Tensor
    word_ids: Tensor
    text_index: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B] tokens that count in each row."""
        return self.attention_mask.sum(1)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class _Row(NamedTuple):
    """One row before padding: parallel lists, sequence -1 for special tokens."""

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    sequences: list[int]
    words: list[int]


def collate(
    encodings: Sequence[tokenizers.Encoding],
    pad_id: int,
    *,
    max_len: int | None,
    truncate: bool,
    stride: int | None,
    multiple: int,
) -> Batch:
    """Encodings as one Batch; see `Tokenizer.__call__` for the arguments."""
    _check(max_len, truncate, stride, multiple)
    rows: list[_Row] = []
    owners: list[int] = []
    for index, encoding in enumerate(encodings):
        if max_len is None or len(encoding) <= max_len:
            rows.append(_row(encoding))
            owners.append(index)
            continue
        if not truncate and stride is None:
            raise DataError(
                f"text {index} has {len(encoding)} tokens, more than max_len {max_len}; shorten "
                "it, or pass truncate=True to cut it or stride=0 to cut it into windows"
            )
        cut = _windows(_row(encoding), max_len, stride, index)
        rows += cut
        owners += [index] * len(cut)
    return _pad(rows, owners, pad_id, multiple)


def _check(max_len: int | None, truncate: bool, stride: int | None, multiple: int) -> None:
    if max_len is None and (truncate or stride is not None):
        raise ConfigError("truncate and stride need max_len: the tokens a row may have")
    if max_len is not None and max_len < 1:
        raise ConfigError(f"max_len is {max_len}; give at least 1")
    if stride is not None and stride < 0:
        raise ConfigError(
            f"stride is {stride}; it is the number of tokens windows share, 0 or more"
        )
    if multiple < 1:
        raise ConfigError(f"pad_to_multiple_of is {multiple}; give at least 1")


def _row(encoding: tokenizers.Encoding) -> _Row:
    sequences = [-1 if s is None else s for s in encoding.sequence_ids]
    words = [-1 if w is None else w for w in encoding.word_ids]
    return _Row(encoding.ids, encoding.type_ids, encoding.offsets, sequences, words)


def _windows(row: _Row, max_len: int, stride: int | None, index: int) -> list[_Row]:
    """The row cut to `max_len`: once (stride None), or into windows sharing `stride` tokens.

    A tokenizer frames texts as [specials] A [specials] B [specials], so a window is the same frame
    around a slice of A or B.
    """
    spans = [_span(row.sequences, s) for s in (0, 1)]
    lengths = [end - start for start, end in spans]
    room = max_len - (len(row.ids) - sum(lengths))
    if room < 1:
        raise DataError(
            f"max_len {max_len} leaves no room for text {index}: "
            f"{len(row.ids) - sum(lengths)} tokens are special; let a window (max_len) hold more"
        )
    if stride is None:
        kept = _shorten(lengths, room)
        return [_cut(row, spans, [(0, kept[0]), (0, kept[1])])]
    cut = 1 if lengths[1] else 0  # of a pair the second is cut: a question stays whole
    room -= lengths[0] if cut else 0
    if room <= stride:
        raise DataError(
            f"windows of {max_len} tokens hold {max(room, 0)} of text {index}, so they cannot "
            f"share {stride}; let a window (max_len) hold more, or lower stride"
        )
    whole = (0, lengths[0])
    return [
        _cut(row, spans, [whole, part] if cut else [part, (0, 0)])
        for part in _parts(lengths[cut], room, stride)
    ]


def _span(sequences: list[int], wanted: int) -> tuple[int, int]:
    if wanted not in sequences:
        return (len(sequences), len(sequences))
    start = sequences.index(wanted)
    return start, start + sequences.count(wanted)


def _shorten(lengths: list[int], room: int) -> list[int]:
    """How much of each text stays: the longer one gives first, then both to equal shares."""
    short, long = min(lengths), max(lengths)
    if room >= 2 * short:
        short_kept, long_kept = short, min(long, room - short)
    else:
        short_kept, long_kept = room // 2, room - room // 2
    return [short_kept, long_kept] if lengths[0] <= lengths[1] else [long_kept, short_kept]


def _parts(length: int, room: int, stride: int) -> Iterator[tuple[int, int]]:
    start = 0
    while True:
        yield start, min(start + room, length)
        if start + room >= length:
            return
        start += room - stride


def _cut(row: _Row, spans: list[tuple[int, int]], kept: list[tuple[int, int]]) -> _Row:
    """A row with a stretch of each text; what stands around the texts stays."""
    slices: list[slice] = []
    done = 0
    for (start, end), (first, last) in sorted(zip(spans, kept, strict=True)):
        slices += [slice(done, start), slice(start + first, min(start + last, end))]
        done = end
    slices.append(slice(done, len(row.ids)))

    def of(values: list[Any]) -> list[Any]:
        return list(chain.from_iterable(values[part] for part in slices))

    return _Row(of(row.ids), of(row.types), of(row.offsets), of(row.sequences), of(row.words))


def _pad(rows: list[_Row], owners: list[int], pad_id: int, multiple: int) -> Batch:
    lengths = np.array([len(row.ids) for row in rows])
    longest = int(lengths.max())
    columns = np.arange(-(-longest // multiple) * multiple)
    counts = columns < lengths[:, None]

    def padded(name: str, fill: int, *inner: int) -> Tensor:
        # one flat array for all rows: a tensor for each would cost more than the encoding
        values = chain.from_iterable(getattr(row, name) for row in rows)
        flat = np.fromiter(chain.from_iterable(values) if inner else values, np.int64)
        whole = np.full((*counts.shape, *inner), fill, np.int64)
        whole[counts] = flat.reshape(-1, *inner)
        return torch.from_numpy(whole)

    return Batch(
        input_ids=padded("ids", pad_id),
        attention_mask=torch.from_numpy(counts.astype(np.int64)),
        token_type_ids=padded("types", 0),
        offsets=padded("offsets", 0, 2),
        sequence_ids=padded("sequences", -1),
        word_ids=padded("words", -1),
        text_index=torch.tensor(owners),
    )
