import json
import pydoc_data.topics

import pytest

from polyhead.errors import FileError
from polyhead.text.directory import state_length
from polyhead.text.tokenizer import Tokenizer

CORPUS = "\n".join(pydoc_data.topics.topics.values())[:30_000]
HARD = [
    "",
    "The statement, it's x = 10!",
    " lead  two\n\n\ttab ",
    "naïve café 日本語 😀",
    "<|endoftext|>text<|im_end|>",
]
KINDS = {"chars": None, "bytes": None, "bpe": 500, "wordpiece": 400, "unigram": 300}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


@pytest.fixture(scope="module")
def trained():
    return {kind: Tokenizer.train(CORPUS, kind, size) for kind, size in KINDS.items()}


def _write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        name, _, ending = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}.{ending}").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loads_here_and_in_transformers(trained, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = trained[kind]
    ours.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    bare = Tokenizer.load(tmp_path / "t" / "tokenizer.json")
    theirs = [
        transformers.AutoTokenizer.from_pretrained(tmp_path / "t"),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "t"),
    ]
    assert again.special_tokens == ours.special_tokens
    assert again.eos_ids == ours.eos_ids
    for text in HARD:
        ids = ours.encode(text)
        assert again.encode(text) == bare.encode(text) == ids
        for their in theirs:
            assert their.encode(text) == ids
            for skip in (True, False):
                decoded = their.decode(ids, skip_special_tokens=skip)
                assert decoded == ours.decode(ids, skip_special_tokens=skip)
    for role, token in ours.special_tokens.items():
        assert getattr(theirs[0], f"{role}_token") == token
        assert getattr(theirs[0], f"{role}_token_id") == ours.backend.token_to_id(token)
    assert theirs[0].pad_token_id == ours.pad_id


def test_nothing_is_overwritten_without_force(trained, tmp_path):
    trained["chars"].save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    with pytest.raises(FileError, match=r"tokenizer\.json is there already; pass force=True"):
        trained["bpe"].save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    trained["bpe"].save(tmp_path, force=True)
    assert Tokenizer.load(tmp_path).vocab == trained["bpe"].vocab
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {p.name for p in tmp_path.iterdir()} == names  # and no drafts


def test_templates_travel_and_stops_with_them(tmp_path):
    tokenizer = Tokenizer.train(
        CORPUS, "bpe", 400, extra_tokens=["<|im_end|>"], chat_template=TEMPLATE
    )
    tokenizer.chat_templates["tool_use"] = "tools: {{ tools | length }}"
    tokenizer.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    again = Tokenizer.load(tmp_path)
    assert again.chat_templates == tokenizer.chat_templates
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages) == "user: hi<|endoftext|>\n"
    assert again.apply_chat_template(messages, tools=[{"name": "f"}]) == "tools: 1"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(messages, tokenize=False) == "user: hi<|endoftext|>\n"
    Tokenizer.train(CORPUS, "chars").save(tmp_path, force=True)
    assert Tokenizer.load(tmp_path).chat_template is None  # not another tokenizer's


def test_a_template_name_cannot_leave_the_directory(tmp_path):
    tokenizer = Tokenizer.train("ab", "chars")
    tokenizer.chat_templates["../../evil"] = "x"
    with pytest.raises(FileError, match="evil"):
        tokenizer.save(tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("*.jinja"))


def test_every_stop_is_known(trained, tmp_path):
    tokenizer = Tokenizer.train(CORPUS, "bpe", 400, extra_tokens=["<|im_end|>", "<|eot|>"])
    end, eot = (tokenizer.backend.token_to_id(t) for t in ("<|im_end|>", "<|eot|>"))
    tokenizer.save(tmp_path)
    _write(tmp_path, generation_config_json={"eos_token_id": [tokenizer.eos_id, eot]})
    assert Tokenizer.load(tmp_path).eos_ids == (tokenizer.eos_id, eot)
    turn = "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    _write(tmp_path, chat_template_jinja=turn)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == (tokenizer.eos_id, eot, end)
    loaded.save(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [tokenizer.eos_id, eot, end]}


@pytest.mark.parametrize(
    "stated",
    [
        TEMPLATE,
        [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "x"}],
        {"default": TEMPLATE},
    ],
)
def test_templates_in_the_config(trained, tmp_path, stated):
    trained["bpe"].save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    _write(tmp_path, tokenizer_config_json={**config, "chat_template": stated})
    assert Tokenizer.load(tmp_path).chat_template == TEMPLATE
    _write(tmp_path, chat_template_jinja="the file wins")
    assert Tokenizer.load(tmp_path).chat_template == "the file wins"


def test_roles_as_dictionaries_and_tokens_beside_the_vocabulary(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained["bpe"].backend.save(str(tmp_path / "tokenizer.json"))
    size = trained["bpe"].vocab_size
    _write(
        tmp_path,
        tokenizer_config_json={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
            "pad_token": "<new pad>",
            "added_tokens_decoder": {str(size): {"content": "<extra>", "special": True}},
            "add_bos_token": False,
        },
        special_tokens_map_json={"bos_token": "<|endoftext|>", "eos_token": "<|pad|>"},
    )
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens.eos == theirs.eos_token == "<|endoftext|>"
    assert ours.pad_id == theirs.pad_token_id == size + 1
    assert ours.encode("a<extra>b<new pad>") == theirs.encode("a<extra>b<new pad>")
    renamed = Tokenizer.load(tmp_path, {"mask": "<extra>", "pad": None})
    assert renamed.mask_id == size
    assert renamed.pad_id == renamed.eos_id


def test_the_post_processor_of_the_file_is_honoured(trained, tmp_path):
    framed = Tokenizer.train(CORPUS, "bpe", 400, add_bos=True)
    framed.save(tmp_path / "framed")
    loaded = Tokenizer.load(tmp_path / "framed")
    assert loaded.encode("x")[0] == loaded.bos_id
    assert loaded.encode("x", add_special_tokens=False) == loaded.encode("x")[1:]
    trained["bpe"].save(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    _write(tmp_path / "plain", tokenizer_config_json={**config, "add_bos_token": True})
    assert Tokenizer.load(tmp_path / "plain").encode("x")[0] == trained["bpe"].bos_id


def test_baked_in_padding_and_cutting_do_not_act(trained, tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(trained["bpe"].backend.to_str())
    backend.enable_padding(pad_id=0, pad_token="<|pad|>", length=64)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CORPUS[:500]) == trained["bpe"].encode(CORPUS[:500])
    assert loaded.special_tokens.pad == "<|pad|>"


def test_a_length_is_stated_where_none_stands(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    state_length(tmp_path, 12)
    assert not any(tmp_path.iterdir())
    trained["wordpiece"].save(tmp_path)
    written = (tmp_path / "tokenizer_config.json").read_text()
    state_length(tmp_path, None)
    assert (tmp_path / "tokenizer_config.json").read_text() == written
    for length in (12, 99):
        state_length(tmp_path, length)
        after = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert after == {**json.loads(written), "model_max_length": 12}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs(CORPUS[:500], truncation=True).input_ids) == 12
    state_length(tmp_path, 8)  # a model that takes less
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 8
    again = Tokenizer.load(tmp_path)
    assert len(again.encode(CORPUS[:500])) > 12
    again.save(tmp_path / "again")
    state_length(tmp_path / "again", 99)
    assert Tokenizer.load(tmp_path / "again").config["model_max_length"] == 8


@pytest.mark.parametrize("lower", [True, False, None])
def test_vocab_txt_as_bert_reads_it(trained, tmp_path, lower):
    transformers = pytest.importorskip("transformers")
    vocab = trained["wordpiece"].vocab
    config = {"tokenizer_class": "BertTokenizer"} | (
        {} if lower is None else {"do_lower_case": lower}
    )
    _write(
        tmp_path,
        vocab_txt="\n".join(sorted(vocab, key=vocab.get)) + "\n",
        tokenizer_config_json=config,
    )
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, "HÉLLO wörld 日本", "[MASK] and [SEP]"]:
        assert ours.encode(text) == theirs.encode(text), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    pair = theirs("a loop", "the block")
    assert ours("a loop", "the block").token_type_ids[0].tolist() == pair["token_type_ids"]
    assert ours.mask_id == theirs.mask_token_id


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "RobertaTokenizer", "Qwen2Tokenizer"])
def test_vocab_json_and_merges(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    special = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}
    trained = Tokenizer.train(CORPUS, "bpe", 600, special, extra_tokens=["<|endoftext|>"])
    model = json.loads(trained.backend.model.__getstate__())
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    _write(
        tmp_path,
        vocab_json=trained.vocab,
        merges_txt="#version: 0.2\n" + "\n".join(merges) + "\n",
        tokenizer_config_json={"tokenizer_class": kind},
    )
    ours = Tokenizer.load(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    for text in [*HARD, "a 1234 e\u0301 I'LL"]:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.eos_id == theirs.eos_token_id


def test_clean_up_is_that_of_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind in ("wordpiece", "bpe"):
        folder = tmp_path / kind
        trained[kind].save(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        _write(folder, tokenizer_config_json={**config, "clean_up_tokenization_spaces": True})
        ours = Tokenizer.load(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in ["it is n't so , is it ? we 've 're", "a ' b ' c . . d 's"]:
            ids = ours.encode(text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "none of tokenizer.json"),
        ({"tokenizer_json": "{"}, "is no tokenizer.json"),
        ({"tokenizer_json": '{"model": 3}'}, "is no tokenizer.json"),
        ({"tokenizer_config_json": "[1]"}, "holds a JSON list"),
        ({"tokenizer_config_json": "{'a'"}, "is not JSON"),
        ({"vocab_txt": "a\nb\n"}, "no BERT vocabulary"),
        ({"vocab_json": "[]", "merges_txt": ""}, "is no vocabulary"),
        ({"vocab_json": '{"a": 0}', "merges_txt": "a b c"}, "two tokens are expected"),
        ({"vocab_json": '{"a": 0}', "merges_txt": "x y"}, "does not fit"),
        (
            {
                "vocab_json": "{}",
                "merges_txt": "",
                "tokenizer_config_json": {"tokenizer_class": "CLIPTokenizer"},
            },
            "of a CLIPTokenizer",
        ),
    ],
)
def test_broken_directories_get_one_line(tmp_path, files, words):
    _write(tmp_path / "d", **files)
    with pytest.raises(FileError, match=words) as caught:
        Tokenizer.load(tmp_path / "d")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"eos_token": 3}, "special token is stated as 3"),
        ({"added_tokens_decoder": {"2": {"special": True}}}, "added token is stated as"),
        ({"added_tokens_decoder": {"9999": {"content": "<x>"}}}, "should have id 9999"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ({"chat_template": [{"title": "x"}]}, "is a list whose entries"),
        ({"chat_template": 3}, "chat_template"),
        ({"additional_special_tokens": 3}, "additional_special_tokens"),
    ],
)
def test_lying_configs_get_one_line(trained, tmp_path, config, words):
    trained["bpe"].backend.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, tokenizer_config_json=config)
    with pytest.raises(FileError, match=words):
        Tokenizer.load(tmp_path)


def test_other_paths(tmp_path):
    with pytest.raises(FileError, match="no such file or directory"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match="use from_gguf"):
        Tokenizer.load(tmp_path / "x.gguf")
