"""Answers that are spans of a context: windows over long ones, no answer on the first token.

(Devlin et al. 2019; SQuAD 2.0: Rajpurkar et al. 2018.) B windows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.train import metrics
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.examples import LabelledBatch, TextInputs, digest_of, part_of, strings
from polyhead.train.objectives import Loss
from polyhead.train.records import Table

LONGEST = 30  # tokens of an answer, when one is read off
_AT_ONCE = 256  # contexts encoded together


@dataclass(frozen=True)
class SpanBatch(LabelledBatch):
    """labels: the answer's first and last token [B, 2]. in_context: whether an answer may touch a
    token [B, T]. offsets: its characters [B, T, 2]. windows: their numbers in the dataset [B]."""

    in_context: Tensor
    offsets: Tensor
    windows: Tensor

    def tokens(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "SpanBatch":
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "inputs"}
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return SpanBatch(inputs=inputs, **moved)


@dataclass(frozen=True, eq=False)
class ContextWindows:
    """Windows over the contexts of a table: item i is (i, row, number of the window in it)."""

    table: Table
    answers: Sequence[Sequence[tuple[str, int]]]
    """Of each row, the texts that are right and where they begin; none where there is no answer."""
    places: Tensor
    """Row and number of each window [N, 2]."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, window: int) -> tuple[int, int, int]:
        row, number = self.places[window].tolist()
        return window, row, number


@dataclass(frozen=True)
class SpanCollator:
    """Windows as a batch; each context is encoded anew, so that nothing but its text is kept."""

    inputs: TextInputs
    stride: int
    rows: ContextWindows

    def __call__(self, chosen: Sequence[tuple[int, int, int]]) -> SpanBatch:
        table = self.rows.table.columns
        batch = windows_of(
            self.inputs, self.stride,
            [table["question"][row] for _, row, _ in chosen],
            [table["context"][row] for _, row, _ in chosen],
        )  # fmt: skip
        firsts = [int((batch.text_index < at).sum()) for at in range(len(chosen))]
        keep = torch.tensor([f + number for f, (*_, number) in zip(firsts, chosen, strict=True)])
        length = int(batch.attention_mask[keep].sum(1).max())
        inputs = {n: v[keep, :length] for n, v in self.inputs.inputs(batch).items()}
        in_context, offsets = batch.sequence_ids[keep, :length] == 1, batch.offsets[keep, :length]
        labels = [
            span_of(self.rows.answers[row][:1], inside, some)
            for (_, row, _), inside, some in zip(chosen, in_context, offsets, strict=True)
        ]
        numbers = torch.tensor([window for window, *_ in chosen])
        return SpanBatch(inputs, torch.tensor(labels), in_context, offsets, numbers)


def windows_of(
    inputs: TextInputs, stride: int, questions: Sequence[str], contexts: Sequence[str]
) -> Any:
    """Questions before windows of their contexts, in order."""
    return inputs.tokenizer(questions, contexts, max_len=inputs.max_len, stride=stride)


def span_of(
    answers: Sequence[tuple[str, int]], in_context: Tensor, offsets: Tensor
) -> tuple[int, int]:
    """First and last token of the answer; 0, 0 where the window does not hold all of it."""
    if not answers:
        return 0, 0
    text, start = answers[0]
    end = start + len(text)
    touched = in_context & (offsets[:, 0] < end) & (offsets[:, 1] > start)
    found = touched.nonzero()[:, 0].tolist()
    if not found or offsets[found[0], 0] > start or offsets[found[-1], 1] < end:
        return 0, 0
    return found[0], found[-1]


def answered_contexts(
    table: Table,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    stride: int = 64,
) -> Examples | None:
    """Questions on contexts. Rows have `answer`, a text, and `start`, its first character (else
    where it first stands), both empty where there is none; or `answers`, as SQuAD's files."""
    for role in ("question", "context"):
        strings(table.columns[role], role, table.name)
    part = part_of(table, config, split)
    if part is None:
        return None
    if stride < 0:
        raise ConfigError(f"stride is {stride}: windows share 0 tokens or more")
    inputs = TextInputs.of(tokenizer, model, config)
    _check_room(part, inputs, stride)
    answers = [_answers(part, row) for row in range(len(part))]
    places: list[tuple[int, int]] = []
    for at in range(0, len(part), _AT_ONCE):
        some = slice(at, at + _AT_ONCE)
        found = windows_of(
            inputs, stride, part.columns["question"][some], part.columns["context"][some]
        )
        for count_at, count in enumerate(torch.bincount(found.text_index).tolist()):
            places += [(at + count_at, number) for number in range(count)]
    rows = ContextWindows(part, answers, torch.tensor(places))
    seal = digest_of(table, tokenizer, inputs.max_len, stride, split)
    return Examples(rows, SpanCollator(inputs, stride, rows), config.seed, seal)


def _check_room(table: Table, inputs: TextInputs, stride: int) -> None:
    """DataError for a question that leaves windows of its context too little room."""
    tokenizer, size = inputs.tokenizer, inputs.max_len
    frame = int((tokenizer(["a"], ["a"]).sequence_ids < 0).sum())
    questions = tokenizer.encode_batch(table.columns["question"], add_special_tokens=False)
    for row, ids in enumerate(questions):
        room = size - frame - len(ids)
        if room > stride:
            continue
        context = tokenizer.encode(table.columns["context"][row], add_special_tokens=False)
        if len(context) > room:
            raise DataError(
                f"{table.name}: row {table.number(row)}: the question has {len(ids)} tokens and "
                f"leaves {max(0, room)} of {size} to its context, whose windows share {stride}: "
                "shorten it, raise context, or lower the option stride"
            )


def _answers(table: Table, row: int) -> list[tuple[str, int]]:
    """The right answers of a row, each where it stands in the context."""
    here = table[row]
    where = f"{table.name}: row {table.number(row)}"
    both = here.get("answers")
    if isinstance(both, Mapping):
        pairs = list(zip(both.get("text", ()), both.get("answer_start", ()), strict=False))
    elif isinstance(both, list) and all(isinstance(one, Mapping) for one in both):
        pairs = [(one.get("text"), one.get("answer_start")) for one in both]
    elif "answer" in here:
        text, start = here["answer"], here.get("start")
        pairs = [(text, None if start in (None, "") else start)] if text else []
    else:
        raise DataError(f"{where} has no answer: a column `answer`, or `answers` as SQuAD's")
    found: list[tuple[str, int]] = []
    for text, start in pairs:
        if not isinstance(text, str):
            raise DataError(f"{where}: the answer is {text!r}: it must be text")
        try:
            at = here["context"].find(text) if start is None else int(start)
        except (TypeError, ValueError):
            raise DataError(f"{where}: start is {start!r}: it must be a number") from None
        if at < 0 or here["context"][at : at + len(text)] != text:
            place = "in its context" if start is None else f"at character {at} of its context"
            raise DataError(f"{where}: the answer {text[:40]!r} is not {place}: mend or remove it")
        found.append((text, at))
    return found


def answer(model: Any, batch: SpanBatch) -> Loss:
    """Mean of the first and the last token's cross-entropies; padding is no answer."""
    logits = model(**batch.inputs).float()
    away = batch.inputs["attention_mask"][..., None] == 0
    logits = logits.masked_fill(away, float("-inf"))
    ends = logits.transpose(1, 2).flatten(0, 1)
    total = F.cross_entropy(ends, batch.labels.flatten(), reduction="sum") / 2
    answers = () if model.training else read_off(logits.detach(), batch)
    return Loss(total, batch.tokens(), {"loss": total.detach()}, answers, lambda: ends)


def read_off(logits: Tensor, batch: SpanBatch) -> tuple[Tensor, ...]:
    """Of each window [B]: its number, the score of no answer, of the best span, and its
    characters' first and last + 1."""
    start, end = logits.unbind(-1)
    none = start[:, 0] + end[:, 0]
    allowed = batch.in_context[:, :, None] & batch.in_context[:, None]
    size = logits.shape[1]
    reach = torch.ones(size, size, device=logits.device).triu().tril(LONGEST - 1).bool()
    scores = (start[:, :, None] + end[:, None]).masked_fill(~(allowed & reach), float("-inf"))
    best, at = scores.flatten(1).max(1)
    row = torch.arange(len(best), device=best.device)
    first, last = at // size, at % size
    return (
        batch.windows, none, best, batch.offsets[row, first, 0], batch.offsets[row, last, 1]
    )  # fmt: skip


def answer_figures(
    model: Any, dataset: Examples, answers: Sequence[tuple[Tensor, ...]]
) -> dict[str, float]:
    """f1 and exact_match, as SQuAD counts them. No answer is given where it scores above every
    span of every window, and some row has none."""
    rows: Any = dataset.rows
    windows, none, best, first, last = (
        torch.cat(side).tolist() for side in zip(*answers, strict=True)
    )
    may_lack = any(not right for right in rows.answers)
    chosen: dict[int, tuple[float, int, int]] = {}
    nulls: dict[int, float] = {}
    for at, window in enumerate(windows):
        _, row, _ = rows[window]
        chosen[row] = max(chosen.get(row, (float("-inf"), 0, 0)), (best[at], first[at], last[at]))
        nulls[row] = min(nulls.get(row, float("inf")), none[at])
    found: list[str] = []
    for row, (score, start, end) in chosen.items():
        lacks = may_lack and nulls[row] > score
        found.append("" if lacks else rows.table.columns["context"][row][start:end])
    right = [[text for text, _ in rows.answers[row]] for row in chosen]
    return {
        "f1": metrics.answer_f1(found, right),
        "exact_match": metrics.exact_match(found, right),
    }
