"""Entities, as transformers' pipeline groups them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.tiny import TEXT, TEXTS, make

import polyhead as ph
from polyhead.tasks.tag import AGGREGATIONS, Tagger

transformers = pytest.importorskip("transformers")

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
LONG = TEXT * 3


def theirs(folder: Path, text: str, aggregation: str) -> list[tuple[str, int, int, float]]:
    pipe = transformers.pipeline(
        "token-classification", str(folder), device="cpu", aggregation_strategy=aggregation
    )
    name = "entity" if aggregation == "none" else "entity_group"
    return [(one[name], one["start"], one["end"], float(one["score"])) for one in pipe(text)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("kind", "labels"), [("bert", TAGS), ("distilbert", ("X", "Y", "O"))])
def test_it_groups_as_the_pipeline_does(
    kind: str, labels: tuple[str, ...], aggregation: str, tmp_path: Path
) -> None:
    made = make(tmp_path, "tag", kind, labels=labels)
    found = Tagger(*made, aggregation=aggregation)(TEXTS)
    for text, ours in zip(TEXTS, found, strict=True):
        expected = theirs(tmp_path, text, aggregation)
        assert [(one.label, one.start, one.end) for one in ours] == [row[:3] for row in expected]
        assert [one.score for one in ours] == pytest.approx([row[3] for row in expected], abs=1e-5)
        assert all(one.text == text[one.start : one.end] for one in ours)


def test_byte_level_words_as_the_pipeline_finds_them(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "tag", "roberta", labels=TAGS, vocab_size=320, pad_id=0)
    tokenizer = ph.Tokenizer.train([TEXT * 4], kind="bpe", vocab_size=320)
    tokenizer.save(tmp_path, force=True)
    for aggregation in ("simple", "first"):
        for text, ours in zip(TEXTS, Tagger(model, tokenizer, aggregation)(TEXTS), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = theirs(tmp_path, text, aggregation)
            assert [(one.label, one.start, one.end) for one in ours] == [r[:3] for r in expected]


@pytest.mark.parametrize("most_tokens", [1, 100, 4096])
def test_a_batch_gives_what_each_text_gives_alone(most_tokens: int, tmp_path: Path) -> None:
    tag = Tagger(*make(tmp_path, "tag", labels=TAGS))
    texts = [*TEXTS, LONG, *TEXTS]
    for text, together in zip(texts, tag(texts, most_tokens=most_tokens), strict=True):
        alone = tag(text)[0]
        assert [(one.label, one.start, one.end) for one in together] == [
            (one.label, one.start, one.end) for one in alone
        ]
        assert [one.score for one in together] == pytest.approx(
            [one.score for one in alone], abs=1e-5
        )


@pytest.mark.parametrize(("window", "stride"), [(None, None), (20, 4), (21, 7), (16, 0)])
def test_each_token_of_a_long_text_is_tagged_once_and_far_from_the_edges(
    window: int | None, stride: int | None, tmp_path: Path
) -> None:
    model, tokenizer = make(tmp_path, "tag", labels=("A", "B", "C"))
    tag = Tagger(model, tokenizer, "none", window=window, stride=stride)
    found = tag(LONG)[0]
    encoded = tokenizer.backend.encode(LONG, add_special_tokens=False)
    assert [(one.start, one.end) for one in found] == encoded.offsets
    room, shared = tag.window - 2, tag.stride
    ids, expected = encoded.ids, []
    for start in range(0, len(ids), room - shared):
        piece = [tokenizer.cls_id, *ids[start : start + room], tokenizer.sep_id]
        scores = model(torch.tensor([piece]))[0, 1:-1].softmax(-1)
        # What two pieces share, the later one takes from the middle on.
        kept = scores if start == 0 else scores[shared // 2 :]
        expected = expected[: start + (0 if start == 0 else shared // 2)] + kept.tolist()
        if start + room >= len(ids):
            break
    assert [one.score for one in found] == pytest.approx([max(row) for row in expected], abs=1e-5)


def test_words_take_their_first_token_s_tag(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "tag", labels=TAGS)
    rows = [["Grace", "unbelievably"], ["moth."], TEXT.split() * 3]
    found = Tagger(model, tokenizer).words(rows)
    assert [[one.text for one in row] for row in found] == rows
    for words, ours in zip(rows[:2], found, strict=False):
        encoded = tokenizer.backend.encode(words, is_pretokenized=True)
        logits = model(torch.tensor([encoded.ids]))[0].softmax(-1)
        for number, one in enumerate(ours):
            score, best = logits[encoded.word_ids.index(number)].max(-1)
            assert (one.label, one.score) == (TAGS[best], pytest.approx(score.item(), abs=1e-5))


@pytest.mark.parametrize(
    ("rows", "word"),
    [(["Ada"], "is a string"), ([["Ada", ""]], "no token for word 1"), ([[]], "is empty"),
     ([["Ada", 3]], "word of row 0 is a int")],
)  # fmt: skip
def test_words_that_are_none(rows: Any, word: str, tmp_path: Path) -> None:
    tag = Tagger(*make(tmp_path, "tag", labels=TAGS))
    with pytest.raises(ph.DataError, match=word):
        tag.words(rows)


def test_what_does_not_tag(tmp_path: Path) -> None:
    made = make(tmp_path, "classify")
    with pytest.raises(ph.ConfigError, match=r"BertForSequenceClassification.*--objective tag"):
        Tagger(*made)
    with pytest.raises(ph.ConfigError, match="'best' is not one of none, simple"):
        Tagger(*made, aggregation="best")
