import pydoc_data.topics

import pytest
import torch

from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer

CORPUS = "\n".join(pydoc_data.topics.topics.values())[:30_000]
WORDS = "the statement is executed when control flow leaves the block of the loop"


@pytest.fixture(scope="module")
def bert():
    return Tokenizer.train(CORPUS, "wordpiece", 500)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(CORPUS, "bpe", 500)


@pytest.fixture(scope="module")
def theirs(bert, bpe, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    loaded = {}
    for name, ours in {"bert": bert, "bpe": bpe}.items():
        folder = tmp_path_factory.mktemp(name)
        ours.save(folder)
        loaded[name] = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    return loaded


def test_padding_is_on_the_right_and_masked(bpe):
    batch = bpe(["a longer text", "a", ""])
    assert batch.lengths.tolist() == [len(bpe.encode(t)) for t in ("a longer text", "a", "")]
    for row, text in zip(range(3), ("a longer text", "a", ""), strict=True):
        n = int(batch.lengths[row])
        assert batch.input_ids[row, :n].tolist() == bpe.encode(text)
        assert (batch.input_ids[row, n:] == bpe.pad_id).all()
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        for start, end in batch.offsets[row, :n].tolist():
            assert 0 <= start < end <= len(text)
    assert batch.text_index.tolist() == [0, 1, 2]
    assert len(batch) == 3
    assert bpe(["abc", "a"], pad_to_multiple_of=16).input_ids.shape == (2, 16)
    assert batch.to("cpu").input_ids.dtype == torch.int64


def test_one_text_is_a_batch_of_one(bpe):
    assert bpe("a text").input_ids.tolist() == [bpe.encode("a text")]


def test_offsets_point_into_the_text(bert):
    text = "Élan naïve statement"
    batch = bert(text)
    spans = [text[start:end] for start, end in batch.offsets[0].tolist()]
    assert "".join(spans) == text.replace(" ", "")
    assert batch.sequence_ids[0].tolist()[0] == batch.sequence_ids[0].tolist()[-1] == -1


def test_pairs_have_types(bert):
    batch = bert(["the loop"], ["the block"])
    ids = batch.input_ids[0].tolist()
    first = bert.encode("the loop", add_special_tokens=False)
    second = bert.encode("the block", add_special_tokens=False)
    cls, sep = bert.cls_id, bert.sep_id
    assert ids == [cls, *first, sep, *second, sep]
    assert batch.token_type_ids[0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    sequences = [-1, *[0] * len(first), -1, *[1] * len(second), -1]
    assert batch.sequence_ids[0].tolist() == sequences


CASES = [
    {"max_len": 8},
    {"max_len": 5},
    {"max_len": 9, "stride": 2},
    {"max_len": 12, "stride": 0},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["bert", "bpe"])
def test_cutting_is_that_of_transformers(bert, bpe, theirs, name, case):
    ours = {"bert": bert, "bpe": bpe}[name]
    texts = [WORDS, "the loop", WORDS[:30]]
    windows = "stride" in case
    batch = ours(texts, max_len=case["max_len"], truncate=not windows, stride=case.get("stride"))
    expected = theirs[name](
        texts,
        max_length=case["max_len"],
        truncation=True,
        padding=True,
        stride=case.get("stride", 0),
        return_overflowing_tokens=windows,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.token_type_ids, expected["token_type_ids"])
    assert torch.equal(batch.offsets, expected["offset_mapping"])
    if windows:
        assert batch.text_index.tolist() == expected["overflow_to_sample_mapping"].tolist()


@pytest.mark.parametrize("max_len", [6, 7, 10, 11, 16, 20])
def test_pairs_are_cut_longest_first(bert, theirs, max_len):
    for first, second in [(WORDS, "the loop"), ("the loop", WORDS), (WORDS, WORDS[:40])]:
        batch = bert(first, second, max_len=max_len, truncate=True)
        expected = theirs["bert"](first, second, max_length=max_len, truncation="longest_first")
        assert batch.input_ids[0].tolist() == expected["input_ids"]
        assert batch.token_type_ids[0].tolist() == expected["token_type_ids"]


def test_windows_of_a_pair_keep_the_question_whole(bert, theirs):
    batch = bert(["the loop", "flow"], [WORDS, "short"], max_len=14, stride=3)
    expected = theirs["bert"](
        ["the loop", "flow"],
        [WORDS, "short"],
        max_length=14,
        truncation="only_second",
        stride=3,
        padding=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.offsets, expected["offset_mapping"])
    assert batch.text_index.tolist() == expected["overflow_to_sample_mapping"].tolist()
    assert batch.text_index.tolist().count(0) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"texts": []}, DataError, "list of texts is empty"),
        ({"texts": ["a", 3]}, DataError, "text 1 is a int"),
        ({"texts": ["a"], "text_pairs": ["b", "c"]}, DataError, "1 texts but 2 second texts"),
        ({"texts": ["a"], "text_pairs": [None]}, DataError, "second text 0 is a NoneType"),
        ({"texts": ["a", WORDS], "max_len": 8}, DataError, r"text 1 has \d+ tokens, more than max"),
        ({"texts": WORDS, "max_len": 2, "truncate": True}, DataError, "leaves no room"),
        ({"texts": WORDS, "max_len": 6, "stride": 4}, DataError, "cannot share 4"),
        ({"texts": WORDS, "truncate": True}, ConfigError, "need max_len"),
        ({"texts": WORDS, "max_len": 0}, ConfigError, "max_len is 0"),
        ({"texts": WORDS, "max_len": 9, "stride": -1}, ConfigError, "stride is -1"),
        ({"texts": WORDS, "pad_to_multiple_of": 0}, ConfigError, "at least 1"),
    ],
)
def test_bad_calls_get_one_line(bert, arguments, error, words):
    with pytest.raises(error, match=words):
        bert(**arguments)
