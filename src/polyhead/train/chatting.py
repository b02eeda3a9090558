"""Conversations to learn from: a loss on what the assistant says, and on nothing else.

Rows hold `messages`, or `prompt` and `answer`. Packed, several conversations lie in a row, each
blind to the others and at positions of its own.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from polyhead.errors import DataError
from polyhead.generate.prompts import check_ids
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.dialogue import Spoken, answered, conversation
from polyhead.train.examples import digest_of, part_of
from polyhead.train.objectives import IGNORE, LanguageBatch, PackedBatch
from polyhead.train.records import Table

Row = tuple[Spoken, ...]
"""What lies in one row of a batch, one after the other."""


@dataclass(frozen=True)
class ChatCollator:
    """Rows padded on the right to the longest: `[B, T]`."""

    pad_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """With the tokenizer's padding, or any token: no label asks for it."""
        return cls(tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id or 0)

    def __call__(self, rows: Sequence[Row]) -> LanguageBatch:
        widest = max(sum(len(part.ids) - 1 for part in row) for row in rows)
        ids = np.full((len(rows), widest), self.pad_id)
        labels = np.full_like(ids, IGNORE)
        places, segments = np.zeros_like(ids), np.full_like(ids, -1)
        for at, row in enumerate(rows):
            begin = 0
            for number, part in enumerate(row):
                end = begin + len(part.ids) - 1
                ids[at, begin:end] = part.ids[:-1]
                labels[at, begin:end] = np.where(part.own[1:], part.ids[1:], IGNORE)
                places[at, begin:end] = np.arange(end - begin)
                segments[at, begin:end] = number
                begin = end
        keep = torch.from_numpy((segments >= 0).astype(np.int64))
        if all(len(row) == 1 for row in rows):
            return LanguageBatch(torch.from_numpy(ids), torch.from_numpy(labels), keep)
        return PackedBatch(
            torch.from_numpy(ids), torch.from_numpy(labels), keep, torch.from_numpy(places),
            segments=torch.from_numpy(segments),
        )  # fmt: skip


def conversations(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split, *,
    raw: bool = False, pack: bool = False,
) -> Examples | None:  # fmt: skip
    """Rows of `messages`, or of `prompt` and `answer` and perhaps `system`.

    raw: prompts as they are, without the tokenizer's chat template. pack: as many conversations in
    a row as `config.context` holds. What is longer is cut at its end, and left out where nothing of
    an answer remains.
    """
    part = part_of(table, config, split)
    if part is None:
        return None
    room = room_of(model, config)
    rows = [_row(part[at], part.number(at), part.name, tokenizer, raw) for at in range(len(part))]
    kept = cut(rows, room)
    if not kept:
        raise DataError(f"{table.name}: no answer begins within context = {room} tokens: raise it")
    if len(kept) < len(rows):
        lost = f"{len(rows) - len(kept)} of {len(rows)} conversations"
        print(f"{lost} are left out: no answer begins within {room} tokens", file=sys.stderr)
    for row in kept:
        check_ids((int(row.ids.max()), int(row.ids.min())), model.config.vocab_size)
    alone: list[Row] = [(row,) for row in kept]
    packed = _packed(kept, room) if pack and split == "train" else alone
    lengths = None if split != "train" else np.array([sum(len(p.ids) for p in r) for r in packed])
    seal = digest_of(table, tokenizer, room, raw, pack, split, tokenizer.chat_template)
    return Examples(packed, ChatCollator.of(tokenizer), config.seed, seal, lengths)


def room_of(model: Any, config: TrainConfig) -> int:
    """How many tokens of a row are predicted at most."""
    limit = model.config.max_tokens
    return config.context if limit is None else min(config.context, limit)


def _row(row: Mapping[str, Any], at: int, name: str, tokenizer: Any, raw: bool) -> Spoken:
    where = f"{name}: row {at}"
    if row.get("messages") is None:
        return answered(tokenizer, row, "answer", where, raw)
    if raw:
        raise DataError(f"{where} has messages, which raw cannot write: give prompt and answer")
    return conversation(tokenizer, row["messages"], where)


def cut(rows: Sequence[Spoken], room: int) -> list[Spoken]:
    """Rows of at most `room` tokens to predict, those that predict any of the model's own."""
    cut = [Spoken(row.ids[: room + 1], row.own[: room + 1]) for row in rows]
    return [row for row in cut if row.own[1:].any()]


def _packed(rows: Sequence[Spoken], room: int) -> list[Row]:
    """Rows side by side, the longest first, each where least room is left (best fit decreasing)."""
    bins: list[list[Spoken]] = []
    left = np.zeros(0, np.int64)
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        size = len(row.ids) - 1
        fits = np.flatnonzero(left >= size)
        if len(fits):
            best = fits[left[fits].argmin()]
            bins[best].append(row)
            left[best] -= size
        else:
            bins.append([row])
            left = np.append(left, room - size)
    return [tuple(row) for row in bins]
