"""Classes of texts and images, and tags of words. B rows, T tokens, C classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import DataError
from polyhead.train import metrics
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.examples import (
    REGRESSION,
    SEVERAL,
    SINGLE,
    LabelledBatch,
    Labels,
    TextInputs,
    as_numpy,
    digest_of,
    labels_of,
    lengths_of,
    numbered,
    part_of,
    problem_of,
    strings,
)
from polyhead.train.objectives import IGNORE, Loss
from polyhead.train.records import Table


@dataclass(frozen=True)
class ClassBatch(LabelledBatch):
    """labels: classes [B], or floats [B, C]; problem: which of the three they are."""

    problem: str = SINGLE


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows of a table with their labels as numbers: row i is (values by role, label)."""

    table: Table
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[dict[str, Any], Any]:
        return self.table[row], self.labels[row]


@dataclass(frozen=True)
class ClassCollator:
    """Texts or pairs with their labels as a batch."""

    inputs: TextInputs
    problem: str
    names: tuple[str, ...]

    def __call__(self, rows: Sequence[tuple[Mapping[str, Any], Tensor]]) -> ClassBatch:
        pairs = [row["pair"] for row, _ in rows] if "pair" in rows[0][0] else None
        inputs = self.inputs([row["text"] for row, _ in rows], pairs)
        return ClassBatch(inputs, torch.stack([label for _, label in rows]), self.problem)


def classified_texts(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Texts (or pairs) with one class, several, or a measure each."""
    for role in table.columns.keys() - {"label"}:
        strings(table.columns[role], role, table.name)
    inputs = TextInputs.of(tokenizer, model, config)
    made = labelled(table, model.config, config, split)
    if made is None:
        return None
    rows, problem, names = made
    seal = digest_of(table, tokenizer, inputs.max_len, problem, names, split)
    texts = [column for role, column in rows.table.columns.items() if role != "label"]
    lengths = lengths_of(texts, split)
    return Examples(rows, ClassCollator(inputs, problem, names), config.seed, seal, lengths)


def labelled(
    table: Table, made: Any, config: TrainConfig, split: Split
) -> tuple[Labelled, str, tuple[str, ...]] | None:
    """One side of a table with its labels, the problem they make, and their names.

    The whole column is checked first.
    """
    problem = problem_of(made, table.columns["label"])
    names = made.labels or tuple(str(number) for number in range(made.num_labels))
    numbered(table.columns["label"], names, problem, table.name)
    part = part_of(table, config, split)
    if part is None:
        return None
    return (
        Labelled(part, numbered(part.columns["label"], names, problem, part.name)),
        problem,
        names,
    )


def class_labels(table: Table, problem: str | None = None) -> Labels:
    """What the label column of a table holds."""
    return labels_of(table.columns["label"], problem)


def decided(model: Any, tokenizer: Any, table: Table) -> None:
    """Name the problem: a head of one label without it is read as a class, and has learned a
    measure."""
    problem = problem_of(model.config, table.columns["label"])
    model.config = replace(model.config, problem=problem)


def classify(model: Any, batch: ClassBatch) -> Loss:
    """Cross-entropy of one class; binary ones of several, or squares of errors, meaned over C."""
    logits = model(**batch.inputs).float()
    if batch.problem == SINGLE:
        total = F.cross_entropy(logits, batch.labels, reduction="sum")
    elif batch.problem == SEVERAL:
        each = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        total = each.mean(-1).sum()
    else:
        total = (logits - batch.labels).square().mean(-1).sum()
    answers = logits.detach(), batch.labels
    compared = partial(_distributions, logits, batch.problem)
    return Loss(total, batch.tokens(), {"loss": total.detach()}, answers, compared)


def _distributions(logits: Tensor, problem: str) -> Tensor:
    """Rows of logits that each make one distribution, or one measure."""
    if problem == SINGLE:
        return logits
    rows = logits.flatten()[:, None]
    return rows if problem == REGRESSION else torch.cat([torch.zeros_like(rows), rows], 1)


def class_figures(
    model: Any, dataset: Examples, answers: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """accuracy and macro_f1; of several labels macro_f1 first; of measures pearson, spearman."""
    logits, labels = (as_numpy(side) for side in zip(*answers, strict=True))
    problem = dataset.collate.problem  # pyright: ignore[reportFunctionMemberAccess]
    if problem == REGRESSION:
        error = float(np.sqrt(np.square(logits - labels).mean()))
        logits, labels = logits.ravel(), labels.ravel()
        return {
            "pearson": metrics.pearson(logits, labels),
            "spearman": metrics.spearman(logits, labels),
            "rmse": error,
        }
    if problem == SEVERAL:
        found = (logits > 0).astype(int)
        labels = labels.astype(int)
        return {
            "macro_f1": metrics.macro_f1(found, labels, labels.shape[1]),
            "accuracy": metrics.accuracy(found, labels),
        }
    found = logits.argmax(-1)
    return {
        "accuracy": metrics.accuracy(found, labels),
        "macro_f1": metrics.macro_f1(found, labels, logits.shape[1]),
    }


@dataclass(frozen=True)
class TagCollator:
    """Words with a tag each: labels [B, T] on each word's first token, -100 elsewhere.

    Words are joined by spaces and encoded as any text is, so that a tagger of plain texts sees the
    same tokens. A word that is cut off, or that no token stands for, does not count.
    """

    inputs: TextInputs
    names: tuple[str, ...]

    def __call__(self, rows: Sequence[tuple[Mapping[str, Any], Tensor]]) -> LabelledBatch:
        words = [row["tokens"] for row, _ in rows]
        batch = self.inputs.encode([" ".join(some) for some in words])
        labels = torch.full_like(batch.input_ids, IGNORE)
        for at, (some, (_, tags)) in enumerate(zip(words, rows, strict=True)):
            first = first_tokens(some, batch.offsets[at].tolist())
            there = [(token, tags[word]) for word, token in enumerate(first) if token is not None]
            for token, tag in there:
                labels[at, token] = tag
        return LabelledBatch(self.inputs.inputs(batch), labels)


def first_tokens(words: Sequence[str], offsets: Sequence[Sequence[int]]) -> list[int | None]:
    """The first token of each word of `" ".join(words)`, None where it has none.

    offsets: of the tokens, in characters; empty ones are special tokens and padding.
    """
    found: list[int | None] = []
    token = start = 0
    for word in words:
        end = start + len(word)
        # A token may begin with the space before its word.
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        is_there = token < len(offsets) and offsets[token][0] < end and bool(word)
        found.append(token if is_there else None)
        # One token for several words stands for the first.
        token += is_there
        start = end + 1
    return found


def tagged_words(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Rows of `tokens` and `tags`: lists, or words between spaces."""
    names = model.config.labels or tuple(str(number) for number in range(model.config.num_labels))
    part = part_of(table, config, split)
    if part is None:
        return None
    tokens, tags = (
        [_split(v, role, part.name, part.number(n)) for n, v in enumerate(part.columns[role])]
        for role in ("tokens", "tags")
    )
    for row, (some, theirs) in enumerate(zip(tokens, tags, strict=True)):
        if len(some) != len(theirs):
            raise DataError(
                f"{part.name}: row {part.number(row)} has {len(some)} tokens and {len(theirs)} "
                "tags: give one for each"
            )
    flat = numbered([tag for row in tags for tag in row], names, SINGLE, part.name)
    labels = torch.split(flat, [len(row) for row in tags])
    rows = Labelled(Table({"tokens": tokens}, part.digest, part.name), labels)
    inputs = TextInputs.of(tokenizer, model, config)
    seal = digest_of(table, tokenizer, inputs.max_len, names, split)
    lengths = lengths_of([tokens], split)
    return Examples(rows, TagCollator(inputs, names), config.seed, seal, lengths)


def tag_labels(table: Table, problem: str | None = None) -> Labels:
    """The tags of a table, "O" first."""
    rows = (_split(v, "tags", table.name, n) for n, v in enumerate(table.columns["tags"]))
    names = sorted({tag for row in rows for tag in row}, key=lambda tag: (tag != "O", tag))
    return Labels(tuple(names), None)


def _split(value: Any, role: str, where: str, row: int) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or None in words:
        raise DataError(f"{where}: {role} of row {row} are {value!r}: give a list, or words")
    return [str(word) for word in words]


def tag(model: Any, batch: LabelledBatch) -> Loss:
    """Cross-entropy of each word's tag."""
    logits = model(**batch.inputs).float()
    counts = batch.labels != IGNORE
    found, labels = logits[counts], batch.labels[counts]
    total = F.cross_entropy(found, labels, reduction="sum")
    # Rows apart, for entities end where a text does.
    answers = found.argmax(-1), labels, counts.sum(1)
    return Loss(total, batch.tokens(), {"loss": total.detach()}, answers, lambda: found)


def tag_figures(
    model: Any, dataset: Examples, answers: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """entity_f1, token_f1 and accuracy; without BIO tags accuracy first, and macro_f1."""
    names = dataset.collate.names  # pyright: ignore[reportFunctionMemberAccess]
    found, labels, lengths = (torch.cat(side) for side in zip(*answers, strict=True))
    right = metrics.accuracy(found, labels)
    if not any(name.startswith("B-") for name in names):
        return {"accuracy": right, "macro_f1": metrics.macro_f1(found, labels, len(names))}
    sizes = lengths.tolist()
    mine, true = (
        [[names[tag] for tag in row.tolist()] for row in side.split(sizes)]
        for side in (found, labels)
    )
    return {
        "entity_f1": metrics.entity_f1(mine, true),
        "token_f1": metrics.token_f1(mine, true),
        "accuracy": right,
    }
