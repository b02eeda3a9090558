"""A tokenizer.json becomes GGUF metadata from which the same tokenizer is read again."""

import json

import pytest

from polyhead.errors import ConfigError
from polyhead.files.gguf import open_gguf
from polyhead.files.gguf_write import write_gguf
from polyhead.models.gguf_tokenizer import tokenizer_metadata, tokenizer_of
from polyhead.text.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The quick brown fox jumps over the lazy dog 12345 times, doesn't it?",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 🦊",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))",
    "  two spaces, a\ttab and    four",
]
CORPUS = [text * 3 for text in TEXTS] + ["low lower lowest newer newest wider widest"] * 20


def through_a_file(folder, metadata) -> Tokenizer:
    write_gguf(folder / "t.gguf", metadata, {})
    return Tokenizer.from_gguf(open_gguf(folder / "t.gguf").metadata)


def assert_same(found: Tokenizer, wanted: Tokenizer) -> None:
    assert found.vocab_size == wanted.vocab_size
    for text in TEXTS:
        assert found.encode(text) == wanted.encode(text)
        assert found.decode(found.encode(text)) == wanted.decode(wanted.encode(text))
    assert (found.bos_id, found.eos_id) == (wanted.bos_id, wanted.eos_id)


@pytest.mark.parametrize("bos", [False, True])
def test_byte_level_bpe(tmp_path, bos):
    roles = {"bos": "<s>", "eos": "</s>"}
    wanted = Tokenizer.train(CORPUS, "bpe", 400, roles, chat_template="{{ messages }}", add_bos=bos)
    wanted.save(tmp_path / "hf")
    metadata = tokenizer_of(tmp_path / "hf")
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.add_bos_token"] is bos
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert_same(through_a_file(tmp_path, metadata), wanted)


@pytest.mark.parametrize("pre", ["gpt2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_the_cut_is_recognised(tmp_path, pre):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        "tokenizer.ggml.merges": [],
    }
    wanted = Tokenizer.from_gguf(metadata)
    wanted.save(tmp_path / "hf")
    assert_same(through_a_file(tmp_path, tokenizer_of(tmp_path / "hf")), wanted)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(tmp_path, kind):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS).replace("\n\n", "\n"))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=360 if kind == "bpe" else 330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    wanted = Tokenizer.load(tmp_path / "tokenizer.model")
    wanted.save(tmp_path / "hf")
    metadata = tokenizer_of(tmp_path / "hf")
    assert metadata["tokenizer.ggml.model"] == {"bpe": "llama", "unigram": "t5"}[kind]
    assert_same(through_a_file(tmp_path, metadata), wanted)


def test_transformers_reads_the_vocabulary(tmp_path):
    transformers = pytest.importorskip("transformers")
    wanted = Tokenizer.train(CORPUS, "bpe", 400, {"bos": "<s>", "eos": "</s>"})
    wanted.save(tmp_path / "hf")
    metadata = {"general.architecture": "gpt2"} | tokenizer_of(tmp_path / "hf")
    write_gguf(tmp_path / "t.gguf", metadata, {})
    found = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False) == wanted.encode(text, False)


def test_the_vocabulary_is_filled_up_to_the_embedding():
    data = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 3}, "merges": []}}
    data["added_tokens"] = [
        {"id": 4, "content": "<x>", "special": True},
        {"id": 5, "content": "<y>", "special": False},
    ]
    metadata = tokenizer_metadata(data, vocab_size=7)
    assert metadata["tokenizer.ggml.tokens"] == [
        "a",
        "[PAD1]",
        "[PAD2]",
        "b",
        "<x>",
        "<y>",
        "[PAD6]",
    ]
    assert metadata["tokenizer.ggml.token_type"] == [1, 5, 5, 1, 3, 4, 5]
    with pytest.raises(ConfigError, match="5 rows"):
        tokenizer_metadata(data, vocab_size=5)


REFUSED = {
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "unknown cut": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "x"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
    },
    "merges of no SentencePiece": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4},
            "merges": [["a", "b"], ["b", "a"], ["ab", "a"]],
        }
    },
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_gguf_cannot_hold_is_refused(data):
    with pytest.raises(ConfigError) as error:
        tokenizer_metadata(json.loads(json.dumps(data)))
    assert "\n" not in str(error.value)


def test_an_unknown_cut_may_be_named():
    assert tokenizer_metadata(REFUSED["unknown cut"], pre="olmo")["tokenizer.ggml.pre"] == "olmo"
