"""Answers to questions, found in a text: span question answering. T tokens."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.models.model import TaskModel
from polyhead.nn.mode import evaluating
from polyhead.tasks.batching import (
    MOST_TOKENS,
    WINDOW,
    Progress,
    batches,
    check_texts,
    inputs,
    longest,
)
from polyhead.tasks.fit import fit
from polyhead.text.batch import Batch
from polyhead.text.tokenizer import Tokenizer

_NEVER = -10_000.0
_Span = tuple[float, int, int]  # score, first character, one after the last


@dataclass(frozen=True)
class Answer:
    """A piece of a context: `text == context[start:end]`, empty where none is the best answer.

    score: the probability, summed over the places that say the same.
    """

    text: str
    start: int
    end: int
    score: float


class Answerer:
    """Questions and contexts to answers: `Answerer(model, tokenizer)([question], [context])`.

    window: tokens of a piece of a long context with its question, at most the model's; None is
    384. stride: tokens that two pieces share; None is half a window, at most 128. max_answer_len:
    tokens of an answer. align_to_words: widen answers to whole words. handle_impossible_answer:
    none may be the best answer. head: which one, where the model has several. What comes out is
    what transformers 4's question-answering pipeline gives.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        *,
        window: int | None = None,
        stride: int | None = None,
        max_answer_len: int = 15,
        align_to_words: bool = True,
        handle_impossible_answer: bool = False,
        head: str | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.fit = fit(model, "answer", head)
        most = longest(model, window)
        self.window = min(most or WINDOW, WINDOW) if window is None else window
        self.stride = min(self.window // 2, 128) if stride is None else stride
        if max_answer_len < 1:
            raise ConfigError(f"max_answer_len is {max_answer_len}; it must be at least 1")
        self.max_answer_len = max_answer_len
        self.align_to_words = align_to_words
        self.handle_impossible_answer = handle_impossible_answer

    def __call__(
        self,
        questions: str | Sequence[str],
        contexts: str | Sequence[str],
        *,
        top_k: int = 1,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> list[list[Answer]]:
        """The `top_k` best answers to each question, the best first, in the order of questions.

        contexts: one for each question, or one for all. Errors: DataError for texts that are empty
        or no strings, and for a question that fills the window.
        """
        questions = [questions] if isinstance(questions, str) else questions
        contexts = [contexts] * len(questions) if isinstance(contexts, str) else contexts
        if len(contexts) != len(questions):
            raise DataError(f"{len(questions)} questions but {len(contexts)} contexts")
        if top_k < 1:
            raise ConfigError(f"top_k is {top_k}; it must be at least 1")
        check_texts(questions, "question")
        check_texts(contexts, "context")
        gathered = [_Gathered(context) for context in contexts]
        done = 0
        with evaluating(self.model), torch.inference_mode():
            for stride, some in self._by_stride(questions).items():
                for batch in batches(
                    self.tokenizer,
                    [questions[i] for i in some],
                    [contexts[i] for i in some],
                    max_len=self.window,
                    stride=stride,
                    most_tokens=most_tokens,
                    progress=_after(done, len(questions), progress),
                ):
                    for row, spans in self._spans(batch, top_k):
                        gathered[some[row]].add(*spans)
                done += len(some)
        return [one.best(top_k, self.handle_impossible_answer) for one in gathered]

    def _by_stride(self, questions: Sequence[str]) -> dict[int, list[int]]:
        """Questions by what their windows can share: long ones leave the context little room."""
        frame = int((self.tokenizer(["a"], ["a"]).sequence_ids < 0).sum())
        found: defaultdict[int, list[int]] = defaultdict(list)
        rows = self.tokenizer.encode_batch(questions, add_special_tokens=False)
        for i, ids in enumerate(rows):
            room = self.window - frame - len(ids)
            if room < 2:
                raise DataError(
                    f"question {i} has {len(ids)} tokens and leaves the context no room in a "
                    f"window of {self.window}; ask in fewer words, or take a larger window"
                )
            found[self.stride if self.stride < room else room // 2].append(i)
        return found

    def _spans(self, batch: Batch, top_k: int) -> Iterator[tuple[int, tuple[list[_Span], float]]]:
        """For each window its question, its best spans in characters, and its score of none."""
        named = {} if self.fit.name is None else {"head": self.fit.name}
        logits = self.model(**inputs(self.model, batch), **named).float().cpu()
        first, last, none = self._probabilities(logits, batch)
        # Some fall together when they are widened to words.
        wanted = 2 * top_k + 10 if self.align_to_words else top_k
        scores, starts, ends = best_spans(first, last, wanted, self.max_answer_len)
        for row, question in enumerate(batch.text_index.tolist()):
            places = _words(batch, row) if self.align_to_words else batch.offsets[row].tolist()
            ranked = zip(
                scores[row].tolist(), starts[row].tolist(), ends[row].tolist(), strict=True
            )
            spans = [
                (score, places[start][0], places[end][1])
                for score, start, end in ranked
                if score > 0
            ]
            yield question, (spans, float(none[row]))

    def _probabilities(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token as an answer's first and last, `[B, T]`; of none, `[B]`.

        None stands at the class token, which shares the probability with the context.
        """
        allowed = batch.sequence_ids == 1
        if self.tokenizer.cls_id is not None:
            allowed |= (batch.input_ids == self.tokenizer.cls_id) & (batch.attention_mask != 0)
        ends = logits.masked_fill(~allowed[:, :, None], _NEVER).softmax(1)
        first, last = ends[:, :, 0].clone(), ends[:, :, 1].clone()
        none = first[:, 0] * last[:, 0]
        first[:, 0], last[:, 0] = 0, 0
        return first, last, none


def best_spans(
    first: Tensor, last: Tensor, top_k: int, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest spans of at most `max_len` tokens: scores, first and last tokens, `[B, k]`.

    first, last: probabilities `[B, T]`; a span's is their product.
    """
    width = first.shape[1]
    longest = min(max_len, width)
    # Row n holds the spans of n + 1 tokens.
    products = torch.stack(
        [
            torch.nn.functional.pad(first[:, : width - n] * last[:, n:], (0, n))
            for n in range(longest)
        ],
        dim=1,
    )
    scores, at = products.flatten(1).topk(min(top_k, longest * width))
    starts = at % width
    return scores, starts, starts + at // width


def _after(done: int, every: int, progress: Progress | None) -> Progress | None:
    """A progress that goes on from what is done."""
    return None if progress is None else lambda now, _: progress(done + now, every)


def _words(batch: Batch, row: int) -> list[list[int]]:
    """For each token of a row the characters of its word, as far as the row holds it."""
    places: list[list[int]] = batch.offsets[row].tolist()
    words: list[int] = batch.word_ids[row].tolist()
    ours: list[bool] = (batch.sequence_ids[row] == 1).tolist()
    whole: dict[int, list[int]] = {}
    for (start, end), word, is_ours in zip(places, words, ours, strict=True):
        if is_ours and word >= 0:
            whole.setdefault(word, [start, end])[1] = end
    return [
        whole.get(word, place) if is_ours else place
        for place, word, is_ours in zip(places, words, ours, strict=True)
    ]


class _Gathered:
    """The answers of one context's windows; those that read alike are one, where it came first."""

    def __init__(self, context: str) -> None:
        self.context = context
        self.found: dict[str, Answer] = {}
        self.none = float("inf")

    def add(self, spans: list[_Span], none: float) -> None:
        """What one window says."""
        self.none = min(self.none, none)
        for score, start, end in spans:
            text = self.context[start:end]
            before = self.found.get(text.lower())
            if before is not None:
                made = Answer(before.text, before.start, before.end, before.score + score)
            else:
                made = Answer(text, start, end, score)
            self.found[text.lower()] = made

    def best(self, top_k: int, with_none: bool) -> list[Answer]:
        """The best first."""
        answers = list(self.found.values())
        if with_none:
            answers.append(Answer("", 0, 0, self.none))
        return sorted(answers, key=lambda answer: answer.score, reverse=True)[:top_k]
