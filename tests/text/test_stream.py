import pydoc_data.topics
import random
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from polyhead.text.special import SpecialTokens, TokenizerParts
from polyhead.text.tokenizer import Tokenizer

CORPUS = "\n".join(pydoc_data.topics.topics.values())[:30_000]
PIECES = ["▁", "▁a", "b", "</w>", "c</w>", "##d", ".", "'", "s", "n't", "m", " ", ",", "?", "é"]


def _made(decoder, clean_up=False, kind=models.WordLevel):
    """A vocabulary of odd pieces and bytes under some decoder."""
    tokens = ["<unk>", *PIECES, *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(kind(vocab, unk_token="<unk>"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<end>"])
    backend.add_tokens([tokenizers.AddedToken("<a dd>", special=False)])
    return Tokenizer(
        TokenizerParts(backend=backend, special=SpecialTokens(eos="<end>"), clean_up=clean_up)
    )


def _llama(*more):
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    )


CASES = {
    "none": lambda: _made(None),
    "llama": lambda: _made(_llama(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: _made(_llama()),
    "strip two": lambda: _made(_llama(decoders.Strip(" ", 2, 0))),
    "strip each": lambda: _made(decoders.Strip("b", 1, 0)),
    "metaspace": lambda: _made(decoders.Metaspace()),
    "metaspace never": lambda: _made(decoders.Metaspace(prepend_scheme="never")),
    "wordpiece": lambda: _made(decoders.WordPiece(), kind=models.WordPiece),
    "wordpiece cleaned": lambda: _made(decoders.WordPiece(), True, kind=models.WordPiece),
    "cleaned": lambda: _made(decoders.Metaspace(), True),
    "cleaned spaces": lambda: _made(None, True),
    "bpe suffix": lambda: _made(decoders.BPEDecoder()),
    "fused": lambda: _made(decoders.Fuse()),
    "replaced after": lambda: _made(_llama(decoders.Replace("b ", "x"))),
    "ctc": lambda: _made(decoders.CTC()),
    "bytes": lambda: Tokenizer.train(CORPUS, "bytes"),
    "bpe": lambda: Tokenizer.train(CORPUS, "bpe", 400),
    "chars": lambda: Tokenizer.train(CORPUS, "chars"),
    "unigram": lambda: Tokenizer.train(CORPUS, "unigram", 300),
}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**16), max_size=24))
def test_pieces_add_up_to_the_whole(made, name, skip, seeds):
    tokenizer = made[name]
    # half from the front, where the special and odd tokens are
    ids = [s % (tokenizer.vocab_size if s % 2 else min(20, tokenizer.vocab_size)) for s in seeds]
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_only_whole_characters_come_out_and_at_once(made):
    tokenizer = made["bytes"]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in "né😀!".encode()] == ["n", "", "é", "", "", "", "😀", "!"]
    assert stream.flush() == ""
    cut = tokenizer.stream()
    assert [cut.push(i) for i in "😀".encode()[:3]] == ["", "", ""]
    assert cut.flush() == "\ufffd"


def test_byte_fallback_waits_for_the_end_of_its_run(made):
    tokenizer = made["llama"]
    vocab = tokenizer.vocab
    stream = tokenizer.stream()
    ids = [vocab["▁"], *(vocab[f"<0x{b:02X}>"] for b in "日".encode()), vocab["b"]]
    assert [stream.push(i) for i in ids] == ["", "", "", "", "日b"]


def test_skipped_and_unknown_ids_are_no_text(made):
    tokenizer = made["bpe"]
    stream = tokenizer.stream()
    assert stream.push(tokenizer.eos_id) == ""
    assert stream.push(10**6) == ""
    assert tokenizer.stream(skip_special_tokens=False).push(tokenizer.eos_id) == "<|endoftext|>"


def test_a_token_costs_the_same_however_long_the_text(made):
    tokenizer = made["bpe"]
    rng = random.Random(0)
    ids = [rng.randrange(300) for _ in range(60_000)]

    def seconds(part):
        stream = tokenizer.stream()
        start = time.thread_time()
        for token_id in part:
            stream.push(token_id)
        return time.thread_time() - start

    seconds(ids[:1000])
    assert seconds(ids) < 30 * 3 * max(seconds(ids[:2000]), 1e-3)
