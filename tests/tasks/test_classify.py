"""Classes of texts, pairs and images, as transformers' pipelines give them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.tiny import TEXTS, make

import polyhead as ph
from polyhead.tasks.classify import Classifier

transformers = pytest.importorskip("transformers")

LABELS = ("bad", "fine", "good")


def theirs(folder: Path, texts: list[Any]) -> list[dict[str, float]]:
    pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    return [{one["label"]: one["score"] for one in row} for row in pipe(texts, top_k=None)]


@pytest.mark.parametrize(
    ("kind", "problem", "labels"),
    [
        ("bert", None, LABELS),
        ("bert", "multi_label_classification", LABELS),
        ("distilbert", "single_label_classification", None),
        ("bert", "regression", ("score",)),
        ("bert", None, ("yes",)),
        ("roberta", "regression", LABELS),
    ],
)
def test_it_says_what_the_pipeline_says(
    kind: str, problem: str | None, labels: tuple[str, ...] | None, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"pad_id": 0} if kind == "roberta" else {}
    model, tokenizer = make(tmp_path, "classify", kind, labels=labels, problem=problem, **more)
    found = Classifier(model, tokenizer)(TEXTS)
    for ours, expected in zip(found, theirs(tmp_path, TEXTS), strict=True):
        assert ours.scores == pytest.approx(expected, abs=1e-5)
        assert ours.label == max(expected, key=expected.__getitem__)
        assert ours.score == pytest.approx(max(expected.values()), abs=1e-5)


def test_pairs_are_told_apart(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "classify", labels=LABELS)
    pairs = TEXTS[::-1]
    found = Classifier(model, tokenizer)(TEXTS, pairs)
    given = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, pairs, strict=True)]
    for ours, expected in zip(found, theirs(tmp_path, given), strict=True):
        assert ours.scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("most_tokens", [1, 40, 4096])
def test_a_batch_of_any_size_gives_what_each_gives_alone(
    kind: str, most_tokens: int, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {} if kind == "bert" else {"d_ff": 40}
    model, tokenizer = make(tmp_path, "classify", kind, labels=LABELS, **fields)
    classify = Classifier(model, tokenizer)
    seen: list[torch.Size] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["input_ids"].shape), with_kwargs=True
    )
    told: list[tuple[int, int]] = []
    many = TEXTS * 7
    found = classify(many, most_tokens=most_tokens, progress=lambda *at: told.append(at))
    hook.remove()
    assert all(rows * width <= most_tokens or rows == 1 for rows, width in seen)
    assert sum(rows for rows, _ in seen) == len(many)
    assert told[-1] == (len(many), len(many))
    for text, together in zip(many, found, strict=True):
        assert classify(text)[0].scores == pytest.approx(together.scores, abs=1e-5)


def test_what_is_too_long_loses_its_end(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "classify", labels=LABELS)
    long = "moth " * 500
    short = tokenizer.decode(tokenizer.encode(long, add_special_tokens=False)[:62])
    classify = Classifier(model, tokenizer)
    assert classify(long)[0].scores == pytest.approx(classify(short)[0].scores, abs=1e-5)


def test_several_labels_may_hold(tmp_path: Path) -> None:
    model, tokenizer = make(
        tmp_path, "classify", labels=LABELS, problem="multi_label_classification"
    )
    for one in Classifier(model, tokenizer)(TEXTS):
        assert one.labels == tuple(label for label in LABELS if one.scores[label] >= 0.5)


def test_one_of_several_heads(tmp_path: Path) -> None:
    tasks = {
        "topic": {"head": "classify", "labels": ["a", "b", "c"]},
        "mood": {"head": "classify", "labels": ["down", "up"]},
        "words": {"head": "tag", "labels": ["O", "X"]},
    }
    model, tokenizer = make(tmp_path, "multitask", tasks=tasks)
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    expected = model(ids, head="mood").softmax(-1)[0].tolist()
    found = Classifier(model, tokenizer, head="mood")(TEXTS[0])[0]
    assert found.scores == pytest.approx(dict(zip(["down", "up"], expected, strict=True)), abs=1e-5)
    with pytest.raises(ph.ConfigError, match="topic, mood"):
        Classifier(model, tokenizer)
    with pytest.raises(ph.ConfigError, match="no such head 'words'"):
        Classifier(model, tokenizer, head="words")


@pytest.mark.parametrize(
    ("texts", "word"),
    [(["fine", ""], "text 1 is empty"), (["fine", "  "], "is empty"), ([3], "is a int"),
     (["\ud800"], "surrogate")],
)  # fmt: skip
def test_texts_that_are_none(texts: list[Any], word: str, tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "classify")
    with pytest.raises(ph.DataError, match=word):
        Classifier(model, tokenizer)(texts)


def test_no_texts_have_no_classes(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "classify")
    assert Classifier(model, tokenizer)([]) == []
    with pytest.raises(ph.DataError, match="2 texts but 1 second"):
        Classifier(model, tokenizer)(["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("kind", "head", "word"),
    [
        ("bert", "lm", "BertForMaskedLM has the head 'lm'.*--objective classify"),
        ("bert", "none", "BertModel has no head"),
        ("bert", "pretraining", "BertForPreTraining"),
        ("t5", "lm", "t5 can carry no such head"),
    ],
)
def test_a_head_that_does_not_fit(kind: str, head: str, word: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(vocab_size=60, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    model = ph.build(kind, head=head, seed=0, **sizes)
    _, tokenizer = make(tmp_path, "lm")
    with pytest.raises(ph.ConfigError, match=word):
        Classifier(model, tokenizer)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model, _ = make(tmp_path, "classify", vocab_size=20)
    tokenizer = ph.tokenizer(tmp_path)
    with pytest.raises(ph.DataError, match="vocabulary of 20"):
        Classifier(model, tokenizer)(TEXTS)


@pytest.mark.parametrize("words", [1, 29, 30, 31, 200])
def test_a_text_whose_end_was_not_read_says_so(words: int, tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "classify", max_seq_len=32)
    given = ["Ada", "Ada " * words, "Was it good?"]
    found = Classifier(model, tokenizer)(given)
    assert [one.is_cut for one in found] == [len(tokenizer.encode(one)) > 32 for one in given]
    assert found[1].is_cut == (words > 30)
    pairs = Classifier(model, tokenizer)(given, ["Ada"] * 3)
    assert [one.is_cut for one in pairs] == [False, words > 28, False]
