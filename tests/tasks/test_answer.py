"""Answers to questions, as the pipeline of transformers 4 gave them (5 has none)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.answer_cases import CASES, CONTEXT, LONG, WHERE, WHO
from tests.tasks.tiny import SIZES, make, repeatable, wordpiece

import polyhead as ph
from polyhead.models.model import TaskModel
from polyhead.tasks.answer import Answerer, best_spans
from polyhead.text.tokenizer import Tokenizer

EXPECTED = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made() -> tuple[TaskModel, Tokenizer]:
    tokenizer = wordpiece()
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size}
    model = ph.build("bert", head="answer", seed=0, **sizes).eval()
    repeatable(model)
    return model, tokenizer


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_pipeline_s_answers(number: int, made: tuple[TaskModel, Tokenizer]) -> None:
    question, context, options = CASES[number]
    names = {"max_seq_len": "window", "doc_stride": "stride"}
    given = {names.get(key, key): value for key, value in options.items() if key != "top_k"}
    found = Answerer(*made, **given)(question, context, top_k=options.get("top_k", 1))[0]
    expected = EXPECTED[number]
    assert [one.score for one in found] == pytest.approx([row[3] for row in expected], abs=1e-6)
    for one, (text, start, end, _) in zip(found, expected, strict=True):
        assert (one.text, one.start, one.end) == (text, start, end)


def test_no_answer_is_as_likely_as_in_the_window_that_doubts_it_most(
    made: tuple[TaskModel, Tokenizer],
) -> None:
    model, tokenizer = made
    windows = tokenizer(WHO, LONG, max_len=40, stride=8)
    scores = []
    for row, length in enumerate(windows.lengths.tolist()):
        named = {"input_ids": windows.input_ids, "token_type_ids": windows.token_type_ids}
        with torch.no_grad():
            logits = model(**{name: value[row, None, :length] for name, value in named.items()})[0]
        allowed = windows.sequence_ids[row, :length] == 1
        allowed[0] = True
        first, last = logits[allowed].softmax(0).T
        scores.append(float(first[0] * last[0]))
    assert len(set(scores)) > 2
    answer = Answerer(*made, window=40, stride=8, handle_impossible_answer=True)
    (none,) = [one for one in answer(WHO, LONG, top_k=10**4)[0] if not one.text]
    assert (none.start, none.end) == (0, 0)
    assert none.score == pytest.approx(min(scores), abs=1e-7)


def test_a_batch_gives_what_each_question_gives_alone(made: tuple[TaskModel, Tokenizer]) -> None:
    answer = Answerer(*made)
    questions = [WHERE, WHO, "Who?", WHERE, WHO]
    contexts = [LONG, "Ada.", CONTEXT, CONTEXT[:30], LONG]
    told: list[tuple[int, int]] = []
    together = answer(questions, contexts, top_k=2, progress=lambda *at: told.append(at))
    assert told[-1] == (5, 5)
    for question, context, found in zip(questions, contexts, together, strict=True):
        alone = answer(question, context, top_k=2)[0]
        assert [one.text for one in found] == [one.text for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-5)
    many = answer(questions, LONG, most_tokens=70)
    assert [one[0].text for one in many] == [answer(q, LONG)[0][0].text for q in questions]


def test_an_answer_is_the_context_s_own_text(made: tuple[TaskModel, Tokenizer]) -> None:
    for one in Answerer(*made)(WHO, LONG, top_k=20)[0]:
        assert one.text == LONG[one.start : one.end]


def test_the_best_spans_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(3)
    first, last = torch.rand(2, 3, 9, generator=generator).softmax(-1)
    scores, starts, ends = best_spans(first, last, 6, 4)
    for row in range(3):
        every = sorted(
            (-float(first[row, s] * last[row, e]), s, e)
            for s in range(9) for e in range(s, min(9, s + 4))
        )[:6]  # fmt: skip
        assert [(s, e) for _, s, e in every] == list(
            zip(starts[row].tolist(), ends[row].tolist(), strict=True)
        )
        assert scores[row].tolist() == pytest.approx([-score for score, _, _ in every])
    assert best_spans(first[:, :2], last[:, :2], 50, 4)[0].shape == (3, 4)


@pytest.mark.parametrize(
    ("question", "context", "word"),
    [
        ("moth " * 70, CONTEXT, "question 0 has 140 tokens.*fewer words"),
        (" ", CONTEXT, "question 0 is empty"),
        (WHO, "", "context 0 is empty"),
        ([WHO], [CONTEXT, CONTEXT], "1 questions but 2 contexts"),
    ],
)
def test_what_cannot_be_asked(
    question: Any, context: Any, word: str, made: tuple[TaskModel, Tokenizer]
) -> None:
    with pytest.raises(ph.DataError, match=word):
        Answerer(*made)(question, context)


def test_a_long_question_leaves_smaller_windows(made: tuple[TaskModel, Tokenizer]) -> None:
    found = Answerer(*made)("was it good or bad? " * 5, LONG)[0][0]
    assert found.text == LONG[found.start : found.end] != ""


@pytest.mark.parametrize(
    ("options", "word"),
    [({"window": 65}, "1 to the model's 64"), ({"max_answer_len": 0}, "max_answer_len is 0")],
)
def test_settings_that_cannot_be(
    options: dict[str, Any], word: str, made: tuple[TaskModel, Tokenizer]
) -> None:
    with pytest.raises(ph.ConfigError, match=word):
        Answerer(*made, **options)


def test_a_model_that_does_not_answer(tmp_path: Path) -> None:
    with pytest.raises(ph.ConfigError, match=r"BertForMaskedLM.*answers questions"):
        Answerer(*make(tmp_path, "lm"))
