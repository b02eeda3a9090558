"""Exact match: what a model writes after a question, against the answers that count."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from polyhead.errors import ConfigError, DataError
from polyhead.tasks.evaluate.choices import share
from polyhead.tasks.evaluate.prompts import BETWEEN, Prompter, check_shots, question_of
from polyhead.tasks.evaluate.result import Metric
from polyhead.tasks.evaluate.samples import field_of, read_rows
from polyhead.tasks.evaluate.task import LocalTask, Record, Sample, Unit, Worker, whole
from polyhead.tasks.evaluate.writing import room_for, written

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Applied in this order; the last three are SQuAD's (Rajpurkar et al. 2016).
_IGNORED = {
    "numbers": lambda text: re.sub(r"[0-9]", "", text),
    "case": str.lower,
    "punctuation": lambda text: text.translate(_PUNCTUATION),
    "articles": lambda text: _ARTICLES.sub(" ", text),
}


@dataclass(frozen=True)
class MatchTask(LocalTask):
    """Questions that a model answers in words of its own, greedily.

    Rows have `question` and `answer`: a text, or a list of texts any of which counts. prompt,
    before, shots, chat: as in `ChoicesTask`. stop: strings that end an answer. extract: a regular
    expression; its last match in the text, or that one's first group, is the answer. ignore:
    "case", "punctuation", "articles", "numbers"; spaces at the ends and runs of them always are.
    """

    kind: ClassVar[str] = "match"
    reads: ClassVar[tuple[str, ...]] = ("question", "answer")
    prompt: str | None = None
    before: str = " "
    shots: int = 0
    chat: bool = False
    max_new_tokens: int = 64
    stop: tuple[str, ...] = (BETWEEN,)
    extract: str | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "shots", 0)
        whole(self, "max_new_tokens", 1)
        for name in self.ignore:
            if name not in _IGNORED:
                raise ConfigError(f"ignore has {name!r}; it can be {', '.join(_IGNORED)}")
        if self.extract is not None:
            try:
                re.compile(self.extract)
            except re.error as error:
                raise ConfigError(
                    f"extract={self.extract!r} is no regular expression: {error}"
                ) from None

    def samples(self, worker: Worker) -> list[Sample]:
        prompter = Prompter(worker.model, worker.tokenizer, self.chat)
        rows = read_rows(self.path)
        check_shots(self.shots, len(rows), self.path)
        column = self.columns.get("question", "question")
        most = room_for(worker.model, self.max_new_tokens)
        examples: list[str] = []
        found: list[Sample] = []
        for number, row in enumerate(rows):
            answers = self._answers(row, number)
            question = question_of(self.prompt, row, column, number, self.path)
            if number < self.shots:
                examples.append(question + self.before + answers[0])
                continue
            ids = prompter.prompt(BETWEEN.join([*examples, question]))
            if not ids:
                raise DataError(f"{self.path}: row {number + 1}: the prompt is empty")
            about = {"row": number, "prompt": question, "answers": answers}
            cut = 0 if most is None else max(0, len(ids) - most)
            found.append(Sample(len(ids) + self.max_new_tokens, (ids[cut:], cut, about)))
        return found

    def answer(self, worker: Worker, samples: Sequence[Sample]) -> list[Record]:
        prompts = [sample.asked[0] for sample in samples]
        texts = written(worker, prompts, self.max_new_tokens, self.stop)
        records: list[Record] = []
        for sample, text in zip(samples, texts, strict=True):
            _, cut, about = sample.asked
            answer = self._extracted(text)
            right = self._plain(answer) in map(self._plain, about["answers"])
            records.append({**about, "text": text, "said": answer, "right": right, "cut": cut})
        return records

    def metrics(self, records: Sequence[Record]) -> dict[str, Metric]:
        return {"exact_match": share(records, "right")}

    def units(self, records: Sequence[Record]) -> dict[str, list[Unit]]:
        return {"exact_match": [Unit(r["row"], r["right"], 1) for r in records]}

    def _answers(self, row: Mapping[str, Any], number: int) -> list[str]:
        name = self.columns.get("answer", "answer")
        value = field_of(row, name, number, self.path)
        answers = [str(one) for one in (value if isinstance(value, list) else [value])]
        if not answers or not all(answer.strip() for answer in answers):
            raise DataError(
                f"{self.path}: row {number + 1}: {name!r} is {value!r:.60}; give a text, or a list "
                "of texts"
            )
        return answers

    def _extracted(self, text: str) -> str:
        if self.extract is None:
            return text.strip()
        matches = list(re.finditer(self.extract, text))
        if not matches:
            return ""
        return (matches[-1][1 if matches[-1].re.groups else 0] or "").strip()

    def _plain(self, text: str) -> str:
        for name, leave_out in _IGNORED.items():
            if name in self.ignore:
                text = leave_out(text)
        return " ".join(text.split())
