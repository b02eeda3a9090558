"""Multiple choice: the choice that a model holds most likely after the question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from polyhead.errors import DataError
from polyhead.tasks.evaluate.intervals import wilson
from polyhead.tasks.evaluate.prompts import BETWEEN, Prompter, check_shots, question_of
from polyhead.tasks.evaluate.result import Metric
from polyhead.tasks.evaluate.samples import field_of, read_rows
from polyhead.tasks.evaluate.task import LocalTask, Record, Sample, Unit, Worker, whole


@dataclass(frozen=True)
class ChoicesTask(LocalTask):
    """Questions with choices, of which the likeliest should be the answer.

    Rows have `question`, `choices` (a list of texts) and `answer`: its place in the list from 0,
    or its text. prompt: a template over a row's columns in braces. before: what stands between a
    prompt and a choice. shots: so many first rows are shown with their answers before each
    question, and are not asked. chat: prompts go into the tokenizer's chat template.

    accuracy: the sum of a choice's log-probabilities decides; accuracy_norm: that sum over its
    bytes, as lm-eval's acc_norm.
    """

    kind: ClassVar[str] = "choices"
    reads: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    prompt: str | None = None
    before: str = " "
    shots: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "shots", 0)

    def samples(self, worker: Worker) -> list[Sample]:
        prompter = Prompter(worker.model, worker.tokenizer, self.chat)
        rows = read_rows(self.path)
        check_shots(self.shots, len(rows), self.path)
        column = self.columns.get("question", "question")
        examples: list[str] = []
        found: list[Sample] = []
        for number, row in enumerate(rows):
            choices, answer = self._choices(row, number)
            question = question_of(self.prompt, row, column, number, self.path)
            if number < self.shots:
                examples.append(question + self.before + choices[answer])
                continue
            text = BETWEEN.join([*examples, question])
            try:
                asked = prompter.pairs(text, [self.before + choice for choice in choices])
            except DataError as error:
                raise DataError(f"{self.path}: row {number + 1}: {error}") from None
            about = {"row": number, "prompt": question, "choices": choices, "answer": answer}
            found.append(Sample(sum(map(_size, asked)), (asked, about)))
        return found

    def answer(self, worker: Worker, samples: Sequence[Sample]) -> list[Record]:
        requests = [request for sample in samples for request in sample.asked[0]]
        scored = iter(worker.scorer.logprobs(requests))
        records: list[Record] = []
        for sample in samples:
            asked, about = sample.asked
            mine = [next(scored) for _ in asked]
            logprobs = [one.logprob for one in mine]
            sizes = [len(choice.encode()) for choice in about["choices"]]
            chosen = _most(logprobs)
            by_size = _most([p / size for p, size in zip(logprobs, sizes, strict=True)])
            records.append(
                {
                    **about,
                    "logprobs": logprobs,
                    "chosen": chosen,
                    "chosen_norm": by_size,
                    "right": chosen == about["answer"],
                    "right_norm": by_size == about["answer"],
                    "cut": max(one.cut for one in mine),
                }
            )
        return records

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        return {
            "accuracy": share(records, "right"),
            "accuracy_norm": share(records, "right_norm"),
        }

    def units(self, records: Sequence[Record]) -> dict[str, list[Unit]]:
        return {
            "accuracy": [Unit(r["row"], r["right"], 1) for r in records],
            "accuracy_norm": [Unit(r["row"], r["right_norm"], 1) for r in records],
        }

    def _choices(self, row: Mapping[str, Any], number: int) -> tuple[list[str], int]:
        """A row's choices, and the place of the answer among them."""
        name = self.columns.get("choices", "choices")
        choices = field_of(row, name, number, self.path)
        where = f"{self.path}: row {number + 1}"
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"{where}: {name!r} is {choices!r:.60}; give a list of 2 texts or more")
        texts = [str(choice) for choice in choices]
        for place, text in enumerate(texts):
            if not text.strip():
                raise DataError(f"{where}: choice {place} is empty; give it words")
        answer = field_of(row, self.columns.get("answer", "answer"), number, self.path)
        if isinstance(answer, str):
            if answer in texts:
                return texts, texts.index(answer)
            if not answer.strip().isdecimal():
                raise DataError(f"{where}: the answer {answer!r:.60} is none of the choices")
            answer = int(answer)
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise DataError(f"{where}: the answer is {answer!r:.60}; give its place, or its text")
        if not 0 <= answer < len(texts):
            raise DataError(
                f"{where}: the answer is {answer}; places go from 0 to {len(texts) - 1}"
            )
        return texts, answer


def share(records: Sequence[Record], name: str) -> Metric:
    """The share of records of which something is true."""
    right = sum(bool(record[name]) for record in records)
    return Metric(right / len(records), wilson(right, len(records)))


def _size(request: Any) -> int:
    return len(request.context) + len(request.continuation)


def _most(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda place: values[place])
