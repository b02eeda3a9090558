"""Perplexity of the texts of a file, with its interval."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from polyhead.errors import DataError
from polyhead.models.model import require_causal
from polyhead.tasks.evaluate.intervals import ratio_interval
from polyhead.tasks.evaluate.result import Metric
from polyhead.tasks.evaluate.samples import read_texts
from polyhead.tasks.evaluate.scorer import Request
from polyhead.tasks.evaluate.task import LocalTask, Record, Sample, Unit, Worker
from polyhead.tasks.perplexity import scorable, window_of


@dataclass(frozen=True)
class PerplexityTask(LocalTask):
    """How well a causal model predicts a text, or each text of a `.jsonl`, `.tsv` or `.csv` file
    under the column `text`.

    Windows as in `ph.perplexity`: context and stride in tokens. The interval draws documents, or
    the windows of a single one.
    """

    kind: ClassVar[str] = "perplexity"
    reads: ClassVar[tuple[str, ...]] = ("text",)
    context: int | None = None
    stride: int | None = None

    def samples(self, worker: Worker) -> list[Sample]:
        require_causal(worker.model)
        context, stride = window_of(worker.model, self.context, self.stride)
        texts = read_texts(self.path, self.columns.get("text", "text"))
        found: list[Sample] = []
        for number, text in enumerate(texts):
            try:
                ids, num_bytes = scorable(worker.tokenizer, text)
            except DataError as error:
                raise DataError(f"{self.path}: text {number + 1}: {error}") from None
            for start, request in _windows(ids, context - 1, stride):
                tokens = len(request.continuation)
                about = {
                    "document": number,
                    "start": start,
                    "tokens": tokens,
                    # A window's share of its text, by tokens.
                    "bytes": num_bytes * tokens / (len(ids) - 1),
                }
                found.append(Sample(len(request.context) + tokens, (request, about)))
        return found

    def answer(self, worker: Worker, samples: Sequence[Sample]) -> list[Record]:
        scored = worker.scorer.logprobs([sample.asked[0] for sample in samples])
        return [
            {**sample.asked[1], "nats": -one.logprob}
            for sample, one in zip(samples, scored, strict=True)
        ]

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        units = self.units(records)
        bits = _metric(units["bits_per_byte"])
        loss = _metric(units["loss"])
        ends = None if loss.interval is None else (_exp(loss.interval[0]), _exp(loss.interval[1]))
        return {
            "perplexity": Metric(_exp(loss.value), ends),
            "bits_per_byte": bits,
            "loss": loss,
        }

    def units(self, records: Sequence[Record]) -> dict[str, list[Unit]]:
        by_text = records[-1]["document"] > 0
        sums: dict[object, list[float]] = {}
        for record in records:
            key = record["document"] if by_text else (record["start"], record["tokens"])
            total = sums.setdefault(key, [0.0, 0.0, 0.0])
            for place, name in enumerate(("nats", "tokens", "bytes")):
                total[place] += record[name]
        return {
            "loss": [Unit(key, nats, tokens) for key, (nats, tokens, _) in sums.items()],
            "bits_per_byte": [
                Unit(key, nats / math.log(2), size) for key, (nats, _, size) in sums.items()
            ],
        }

    def note(self, records: Sequence[Record]) -> str:
        texts = records[-1]["document"] + 1
        over = f"{texts} documents" if texts > 1 else f"{len(records)} windows of one document"
        return f"{sum(record['tokens'] for record in records)} tokens; interval over {over}"


def _windows(ids: Sequence[int], context: int, stride: int) -> Iterator[tuple[int, Request]]:
    """What each window reads, and what it is to predict where nobody did before; where that
    starts."""
    last, scored = len(ids) - 1, 0
    for start in range(0, last, stride):
        end = min(start + context, last)
        yield scored + 1, Request(ids[start : scored + 1], ids[scored + 1 : end + 1])
        scored = end
        if end == last:
            return


def _metric(units: Sequence[Unit]) -> Metric:
    above, below = [unit.above for unit in units], [unit.below for unit in units]
    return Metric(sum(above) / sum(below), ratio_interval(above, below))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
