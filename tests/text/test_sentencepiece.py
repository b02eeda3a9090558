import pydoc_data.topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import FileError
from polyhead.text.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece", reason="sentencepiece is the oracle here")

HARD = [
    "",
    " ",
    "hello world",
    " two  spaces   three ",
    "a\tb\tc",
    "line\nline\n\n  indented\n",
    "naïve café, Zürich e\u0301",
    "日本語のテキスト",
    "emoji 😀👩‍👩‍👧 flags 🇫🇷",
    "def f(x):\n    return x ** 2  # comment",
    "ﬁ ½ ①",
    "1234567890 3.14",
    "mixed ▁ mark",
    "zero\u200bwidth\u00a0nbsp",
]
OPTIONS = {
    "unigram": {"model_type": "unigram"},
    "unigram bytes": {"model_type": "unigram", "byte_fallback": True},
    "bpe": {"model_type": "bpe"},
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
    "no prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "symbols": {
        "model_type": "unigram",
        "user_defined_symbols": ["<sep>", "<extra>"],
        "pad_id": 3,
        "normalization_rule_name": "nfkc",
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    text = "\n".join(pydoc_data.topics.topics.values())[:60_000]
    corpus = folder / "corpus.txt"
    corpus.write_text(text + "\ncafé naïve 日本語 日本 テキスト\n", encoding="utf-8")
    made = {}
    for name, options in OPTIONS.items():
        prefix = folder / name.replace(" ", "_")
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(prefix),
            vocab_size=600,
            character_coverage=0.9995,
            minloglevel=2,
            num_threads=1,
            hard_vocab_limit=False,
            **options,
        )
        path = prefix.with_suffix(".model")
        made[name] = (spm.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(path), path)
    return made


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_and_text_are_sentencepieces_own(models, name):
    oracle, ours, _ = models[name]
    assert ours.vocab_size == oracle.get_piece_size()
    for text in HARD:
        ids = oracle.encode(text)
        assert ours.encode(text) == ids, text
        if oracle.unk_id() not in ids:
            assert ours.decode(ids) == oracle.decode(ids), text


@settings(max_examples=150, deadline=None)
@given(
    # Names of special tokens, which hypothesis finds in the sources, are text to sentencepiece.
    text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30).filter(
        lambda drawn: not any(name in drawn for name in ("<s>", "</s>", "<unk>", "<pad>"))
    )
)
def test_ids_of_any_text_with_byte_fallback(models, text):
    oracle, ours, _ = models["llama"]
    assert ours.encode(text) == oracle.encode(text)
    assert ours.decode(ours.encode(text)) == oracle.decode(oracle.encode(text))


def test_roles_come_from_the_file(models):
    _, ours, _ = models["symbols"]
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2, 3)
    _, without_pad, _ = models["bpe"]
    assert without_pad.pad_id == without_pad.eos_id == 2


def test_control_pieces_written_in_a_text_are_their_ids(models):
    _, ours, _ = models["llama"]
    assert ours.encode("<s>hello</s>") == [1, *ours.encode("hello"), 2]
    assert ours.decode([1, *ours.encode("hello"), 2]) == "hello"
    symbols = models["symbols"][1]
    assert symbols.backend.token_to_id("<sep>") in symbols.encode("one<sep>two")


def test_what_is_saved_loads_in_transformers_with_the_same_ids(models, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, (_, ours, _) in models.items():
        folder = tmp_path / name
        ours.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in HARD:
            assert theirs.encode(text) == ours.encode(text), (name, text)


def test_a_llama_directory_adds_bos(models, tmp_path):
    _, ours, path = models["llama"]
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert Tokenizer.load(tmp_path).encode("hello") == [1, *ours.encode("hello")]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(FileError, match=r"convert the tokenizer to tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_damaged_files_are_refused(models, tmp_path):
    data = models["bpe"][2].read_bytes()
    path = tmp_path / "broken.model"
    for broken in (data[:100], data[: len(data) // 2] + b"\xff", b"", b"not a model", b"\x0a\x05"):
        path.write_bytes(broken)
        with pytest.raises(FileError, match=r"no SentencePiece model|cannot be read"):
            Tokenizer.load(path)
