import hashlib
import pydoc_data.topics
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer

CORPUS = "\n".join(pydoc_data.topics.topics.values())[:40_000]
KINDS = {"chars": None, "bytes": None, "bpe": 600, "wordpiece": 400, "unigram": 400}
# Hypothesis also draws strings that it finds in the sources, names of special tokens among them.
text = st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda drawn: "|>" not in drawn)


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train(CORPUS, kind, size) for kind, size in KINDS.items()}


@pytest.mark.parametrize("kind", ["chars", "bytes", "bpe", "unigram"])
def test_seen_text_survives(trained, kind):
    tokenizer = trained[kind]
    assert tokenizer.decode(tokenizer.encode(CORPUS)) == CORPUS
    assert tokenizer.decode(tokenizer.encode("\n\n  two\n ")) == "\n\n  two\n "
    assert tokenizer.encode("") == []


@settings(max_examples=200, deadline=None)
@given(text=text)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_text_survives_bytes(trained, kind, text):
    tokenizer = trained[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=text)
def test_chars_give_one_id_a_character_and_unk_for_the_unseen(trained, text):
    tokenizer = trained["chars"]
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    for token_id, char in zip(ids, text, strict=True):
        assert (token_id == tokenizer.unk_id) == (char not in CORPUS)
    assert tokenizer.decode(ids) == "".join(c for c in text if c in CORPUS)


def test_ids_are_in_a_fixed_place():
    chars = Tokenizer.train("cab\n", "chars")
    assert chars.decode_batch([[i] for i in range(chars.vocab_size)]) == [*[""] * 3, *"\nabc"]
    assert Tokenizer.train("x", "bytes").encode("aé") == [0x61, 0xC3, 0xA9]
    assert Tokenizer.train("x", "bytes").vocab_size == 258
    assert chars.vocab_size == len(chars) == 7


def test_roles_and_their_changes():
    tokenizer = Tokenizer.train(
        CORPUS, "bpe", 400, {"pad": None, "mask": "<m>"}, extra_tokens=["<|im_end|>"]
    )
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.bos_id  # pad falls back to eos
    assert tokenizer.decode([tokenizer.mask_id], skip_special_tokens=False) == "<m>"
    assert tokenizer.encode("a<|im_end|>b")[1] in tokenizer.special_ids
    assert tokenizer.unk_id is tokenizer.cls_id is tokenizer.sep_id is None
    none = dict.fromkeys(("pad", "bos", "eos"))
    bare = Tokenizer.train("ab", "chars", special_tokens=none)
    assert (bare.pad_id, bare.eos_ids, bare.vocab_size) == (None, (), 3)


def test_wordpiece_frames_like_bert(trained):
    tokenizer = trained["wordpiece"]
    ids = tokenizer.encode("the statement")
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id
    assert tokenizer.encode("the statement", add_special_tokens=False) == ids[1:-1]
    assert tokenizer.decode(ids) == "the statement"


def test_bos_and_eos_are_added_when_asked():
    tokenizer = Tokenizer.train("abc", "chars", add_bos=True, add_eos=True)
    assert tokenizer.encode("ab") == [
        tokenizer.bos_id,
        *tokenizer.encode("ab", add_special_tokens=False),
        tokenizer.eos_id,
    ]


DIGESTS = """
import hashlib, pydoc_data.topics
from polyhead.text.tokenizer import Tokenizer
text = "\\n".join(pydoc_data.topics.topics.values())[:40_000]
for kind, size in {kinds}.items():
    tokenizer = Tokenizer.train([text[:9000], text[9000:]], kind, size)
    print(hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest())
"""


def test_training_is_the_same_in_another_process():
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS.format(kinds=KINDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    for kind, there in zip(KINDS, done.stdout.split(), strict=True):
        here = Tokenizer.train([CORPUS[:9000], CORPUS[9000:]], kind, KINDS[kind])
        assert hashlib.sha256(here.backend.to_str().encode()).hexdigest() == there, kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corpus", ["", [], ["", ""], iter(())])
def test_an_empty_corpus_is_refused(kind, corpus):
    with pytest.raises(DataError, match="holds no text"):
        Tokenizer.train(corpus, kind, KINDS[kind])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kind": "words"}, ConfigError, "unknown kind 'words'"),
        ({"kind": "bpe", "vocab_size": 200}, ConfigError, "need at least 258"),
        ({"kind": "bytes", "vocab_size": 200}, ConfigError, "too small.*258"),
        ({"kind": "wordpiece", "vocab_size": 20}, ConfigError, "vocab_size 20 is too small"),
        ({"kind": "unigram", "vocab_size": 20}, ConfigError, "vocab_size 20 is too small"),
        ({"kind": "chars", "vocab_size": 0}, ConfigError, "positive"),
        ({"kind": "chars", "special_tokens": {"unk": None}}, ConfigError, "needs an unk token"),
        ({"kind": "chars", "special_tokens": {"end": "x"}}, ConfigError, "unknown special token"),
        ({"kind": "chars", "special_tokens": {"eos": ""}}, ConfigError, "eos token is ''"),
        (
            {"kind": "bpe", "special_tokens": {"eos": None}, "add_eos": True},
            ConfigError,
            "add_eos is set but no eos",
        ),
        ({"kind": "chars", "texts": [b"bytes"]}, DataError, "text 0 of the corpus is a bytes"),
    ],
)
def test_bad_settings_get_one_line(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        Tokenizer.train(**{"texts": CORPUS, **arguments})
    assert "\n" not in str(caught.value)


def test_chars_with_a_limit_keep_the_most_frequent():
    tokenizer = Tokenizer.train("aaabbbcd", "chars", 5)
    assert tokenizer.decode(tokenizer.encode("abcd")) == "ab"


def test_bad_input_to_encode_and_decode(trained):
    tokenizer = trained["bpe"]
    with pytest.raises(DataError, match="half a surrogate pair at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match="text 0 is a int"):
        tokenizer.encode(3)
    with pytest.raises(DataError, match="-1 is not a token id"):
        tokenizer.decode([1, -1])
    with pytest.raises(DataError, match="decode_batch"):
        tokenizer.decode([[1, 2]])
    assert tokenizer.decode([10**6]) == ""  # padded rows of a model's table are no text
