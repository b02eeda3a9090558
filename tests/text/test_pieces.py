"""Tokens as a reader would see them, and which of them part others."""

import pytest

import polyhead as ph
from polyhead.text.pieces import is_mark, pieces


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("one, two!\n = (3)", {",", "!", "\n", " =", " (", ")"}),
        ("שלום עולם", set()),  # letters of two bytes, in pieces
        ("好。", set()),
        ("👍 ok", set()),
        ("", set()),
    ],
)
def test_marks_are_no_parts_of_letters(text: str, marks: set[str]) -> None:
    tokenizer = ph.Tokenizer.train(["one, two! = (3)\n" * 9], kind="bpe", vocab_size=270)
    ids = tokenizer.encode(text)
    found = {
        name for name, i in zip(pieces(tokenizer, ids), ids, strict=True) if is_mark(tokenizer, i)
    }
    assert {name.strip(" ") for name in found} - {""} == {name.strip(" ") for name in marks}


def test_special_tokens_are_marks() -> None:
    tokenizer = ph.Tokenizer.train(["a cat sat"] * 9, kind="wordpiece", vocab_size=60)
    ids = tokenizer.encode("a cat")
    assert [is_mark(tokenizer, i) for i in ids][:1] == [True]
    assert not is_mark(tokenizer, ids[1])
