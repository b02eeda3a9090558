"""What stands behind masks, as transformers' pipeline says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.tiny import make

import polyhead as ph
from polyhead.tasks.fill import Filler

transformers = pytest.importorskip("transformers")

MASKED = [
    "Grace Hopper found a [MASK].",
    "[MASK]",
    "The Analytical [MASK] weaves algebraic patterns, just as the loom weaves flowers.",
    "Was it [MASK]?",
]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "albert"])
def test_it_fills_as_the_pipeline_does(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"pad_id": 0} if kind == "roberta" else {}
    made = make(tmp_path, "lm", kind, **more)
    pipe = transformers.pipeline("fill-mask", model=str(tmp_path), device="cpu")
    found = Filler(*made)(MASKED, top_k=7)
    assert [len(masks) for masks in found] == [1, 1, 1, 1]
    for text, (ours,) in zip(MASKED, found, strict=True):
        expected = pipe(text, top_k=7)
        assert [one.token_id for one in ours] == [row["token"] for row in expected]
        assert [one.token for one in ours] == [row["token_str"] for row in expected]
        assert [one.text for one in ours] == [row["sequence"] for row in expected]
        assert [one.score for one in ours] == pytest.approx(
            [row["score"] for row in expected], abs=1e-5
        )


def test_each_of_several_masks(tmp_path: Path) -> None:
    made = make(tmp_path, "lm")
    text = "[MASK] Hopper found a [MASK] in [MASK]."
    expected = transformers.pipeline("fill-mask", model=str(tmp_path), device="cpu")(text, top_k=3)
    (found,) = Filler(*made)([text], top_k=3)
    assert len(found) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token_id for one in ours] == [row["token"] for row in theirs]
        assert all(one.text.count("[MASK]") >= 2 and "[CLS]" not in one.text for one in ours)


def test_a_batch_gives_what_each_text_gives_alone(tmp_path: Path) -> None:
    fill = Filler(*make(tmp_path, "lm"))
    texts = [*MASKED, "[MASK] and [MASK]"] * 5
    for text, together in zip(texts, fill(texts, most_tokens=60), strict=True):
        (alone,) = fill(text)
        for ours, theirs in zip(together, alone, strict=True):
            assert [one.token_id for one in ours] == [one.token_id for one in theirs]
            assert [one.score for one in ours] == pytest.approx([o.score for o in theirs], abs=1e-5)


def test_an_enhanced_decoder_speaks_through_the_whole_model(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "lm", "deberta-v2", position_buckets=8)
    ids = tokenizer.encode(MASKED[0])
    with torch.no_grad():
        row = model(torch.tensor([ids]))[0, ids.index(tokenizer.mask_id)].softmax(-1)
    found = Filler(model, tokenizer)([MASKED[2], MASKED[0]], top_k=4)[1][0]
    scores, best = row.topk(4)
    assert [one.token_id for one in found] == best.tolist()
    assert [one.score for one in found] == pytest.approx(scores.tolist(), abs=1e-5)


def test_the_language_head_of_a_pretraining_model(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, "pretraining")
    ids = tokenizer.encode(MASKED[0])

    row = model(torch.tensor([ids]), head="lm")[0, ids.index(tokenizer.mask_id)].softmax(-1)
    best = Filler(model, tokenizer)(MASKED[0], top_k=1)[0][0][0]
    assert (best.token_id, best.score) == (
        int(row.argmax()),
        pytest.approx(row.max().item(), rel=1e-5),
    )


def test_the_states_are_those_that_its_own_head_reads(tmp_path: Path) -> None:
    tasks = {"names": {"head": "tag"}, "words": {"head": "lm"}}
    model, tokenizer = make(tmp_path, "multitask", "deberta-v2", position_buckets=8, tasks=tasks)
    fill, ids = Filler(model, tokenizer), tokenizer.encode(MASKED[0])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), head="words")
    row = logits[0, ids.index(fill.mask_id)].softmax(-1)
    best = fill(MASKED[0], top_k=1)[0][0][0]
    assert (best.token_id, best.score) == (
        int(row.argmax()),
        pytest.approx(row.max().item(), rel=1e-5),
    )


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["Ada [MASK].", "Ada."], r"text 1 has no mask to fill; write \[MASK\]"),
        (["[MASK] " + "moth " * 80], "text 0 has 163 tokens and the model takes 64"),
        ([""], "empty"),
    ],
)
def test_what_cannot_be_filled(texts: list[str], word: str, tmp_path: Path) -> None:
    fill = Filler(*make(tmp_path, "lm"))
    with pytest.raises(ph.DataError, match=word):
        fill(texts)


def test_what_does_not_fill(tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path / "lm", "lm")
    bare = ph.Tokenizer.train(["ab"], kind="bytes")
    with pytest.raises(ph.DataError, match="no mask token"):
        Filler(model, bare)
    with pytest.raises(ph.ConfigError, match=r"BertForTokenClassification.*--objective masked-lm"):
        Filler(make(tmp_path / "tag", "tag")[0], tokenizer)
    with pytest.raises(ph.ConfigError, match="gpt2 is of the kind decoder"):
        Filler(make(tmp_path / "gpt2", "lm", "gpt2")[0], tokenizer)
