"""Sequences to sequences: translation, summaries. B rows, S source and T target tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.generate.seq2seq import Seq2Seq, start_id
from polyhead.train import metrics
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.examples import (
    LabelledBatch,
    TextInputs,
    digest_of,
    lengths_of,
    part_of,
    strings,
)
from polyhead.train.objectives import IGNORE, Loss, shifted, smoothed_cross_entropy
from polyhead.train.records import Table


@dataclass(frozen=True)
class TargetCollator:
    """Sources and targets: labels [B, T] end with eos; the decoder reads them one step later."""

    inputs: TextInputs
    start: int
    end: int

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> LabelledBatch:
        inputs = self.inputs([row["source"] for row in rows])
        targets = self.inputs.tokenizer.encode_targets([row["target"] for row in rows])
        targets = [[*ids[: self.inputs.max_len - 1], self.end] for ids in targets]
        labels = torch.full((len(rows), max(map(len, targets))), IGNORE)
        for row, ids in zip(labels, targets, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        inputs["decoder_input_ids"] = shifted(labels, self.start, self.end)
        inputs["decoder_attention_mask"] = (labels != IGNORE).long()
        return LabelledBatch(inputs, labels)


def translated_texts(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Rows of `source` and `target`."""
    tokenizer.encode_targets([])  # refuses now what it would refuse at the first batch
    for role in ("source", "target"):
        strings(table.columns[role], role, table.name)
    if blank := [row for row, text in enumerate(table.columns["source"]) if not text.strip()]:
        raise DataError(f"{table.name}: source of row {blank[0]} is empty: take the row out")
    start = start_id(model, tokenizer)
    if start is None or tokenizer.eos_id is None:
        what = "starts" if start is None else "ends"
        raise ConfigError(f"the tokenizer has no token that {what} a target: give it bos and eos")
    part = part_of(table, config, split)
    if part is None:
        return None
    inputs = TextInputs.of(tokenizer, model, config)
    seal = digest_of(table, tokenizer, inputs.max_len, start, split)
    collate = TargetCollator(inputs, start, tokenizer.eos_id)
    lengths = lengths_of(part.columns.values(), split)
    return Examples(part, collate, config.seed, seal, lengths)  # pyright: ignore[reportArgumentType]


def decided_ids(model: Any, tokenizer: Any, source: Any) -> None:
    """Say what a fresh model's decoder begins and ends with: transformers writes nothing without,
    and takes the ids of another tokenizer for them."""
    if start_id(model) is not None:
        return
    ids = {
        "decoder_start_token_id": start_id(model, tokenizer),
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    told = {name: value for name, value in ids.items() if value is not None}
    model.generation = {**told, **model.generation}


def seq2seq(model: Any, batch: LabelledBatch, smoothing: float = 0.1) -> Loss:
    """Cross-entropy of the targets, and a part `smoothing` of it spread over the vocabulary
    (Szegedy et al. 2016): `loss` is the cross-entropy alone."""
    states = model.backbone(**batch.inputs)
    counts = batch.labels != IGNORE
    hidden, labels = states[counts], batch.labels[counts]
    smoothing = smoothing if model.training else 0.0
    total, nll = smoothed_cross_entropy(model.head, hidden, labels, smoothing)
    parts = {"loss": nll, **({"smoothing": (total - nll).detach()} if smoothing else {})}
    return Loss(total, batch.tokens(), parts, _told(model, batch), lambda: model.answer(hidden))


def _told(model: Any, batch: LabelledBatch) -> tuple[Tensor, ...]:
    """What a validation writes from: sources, their masks, and targets."""
    if model.training:
        return ()
    return batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels


def translation_figures(
    model: Any, dataset: Examples, answers: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """bleu and chrf of what the model writes greedily, with the ends of BLEU's 95 % interval."""
    collate: Any = dataset.collate
    tokenizer = collate.inputs.tokenizer
    sources: list[list[int]] = []
    references: list[str] = []
    for ids, mask, labels in answers:
        for row, keep, target in zip(ids, mask, labels, strict=True):
            sources.append(row[keep.bool()].tolist())
            references.append(tokenizer.decode(target[target != IGNORE].tolist()))
    writer = Seq2Seq(model, tokenizer)
    longest = max(map(len, (labels[0] for *_, labels in answers)))
    settings = writer.settings(num_beams=1, max_new_tokens=min(collate.inputs.max_len, 2 * longest))
    written = [tokenizer.decode(best[0].ids) for best in writer.generate(sources, settings)]
    bleu = metrics.bleu(written, references, resamples=200)
    return {
        "bleu": bleu.score,
        "chrf": metrics.chrf(written, references, resamples=0).score,
        "bleu_low": bleu.low,
        "bleu_high": bleu.high,
    }
