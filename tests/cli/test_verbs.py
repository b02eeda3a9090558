import json

import pytest
import torch

from polyhead.cli import convert
from polyhead.cli.fields import parse_fields
from polyhead.cli.info import figures
from polyhead.errors import ConfigError
from polyhead.files.gguf import open_gguf
from polyhead.images.processor import Processor
from polyhead.images.sizes import Exactly
from polyhead.models.assemble import build
from polyhead.models.llama_config import LlamaConfig
from polyhead.models.load import load, tokenizer
from polyhead.tasks.perplexity import perplexity

from .conftest import TEXT, save_model


def test_perplexity_prints_what_the_library_finds(cli, plain, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:300])
    wanted = perplexity(load(plain), tokenizer(plain), TEXT[:300], context=32, stride=8)
    found = cli("perplexity", plain, file, "--context", 32, "--stride", 8, "--json")
    assert json.loads(found.out)["bits_per_byte"] == pytest.approx(wanted.bits_per_byte)
    lines = cli("perplexity", plain, file, "--context", 32, "--stride", 8).out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["perplexity", "bits per byte", "tokens"]
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"caf\xe9")
    assert "not UTF-8" in cli("perplexity", plain, bad).err


def same(one, other):
    left, right = load(one, dtype="float32").state_dict(), load(other, dtype="float32").state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_convert_there_and_back(cli, chatty, tmp_path):
    gguf, back, again = tmp_path / "m.gguf", tmp_path / "back", tmp_path / "again.gguf"
    found = cli("convert", chatty, gguf, "--to", "gguf", "--verify", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["max_logit_difference"] <= 1e-5
    assert cli("convert", gguf, back, "--to", "hf", "--verify").code == 0
    assert cli("convert", gguf, again, "--to", "gguf").code == 0
    assert same(chatty, gguf)
    assert same(chatty, back)
    first, second = open_gguf(gguf).metadata, open_gguf(again).metadata
    words = {key: value for key, value in first.items() if key.startswith("tokenizer.")}
    assert words == {key: second.get(key) for key in words}
    ids = tokenizer(chatty).encode(TEXT[:80])
    for path in (gguf, back):
        assert tokenizer(path).encode(TEXT[:80]) == ids
        assert tokenizer(path).chat_template == tokenizer(chatty).chat_template


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_convert_to_another_type_is_verified_against_its_rounding(cli, plain, tmp_path, dtype):
    for to, dest in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "m.gguf")):
        found = cli("convert", plain, dest, "--to", to, "--dtype", dtype, "--verify")
        assert found.code == 0, found.err
    stored = load(tmp_path / "hf", dtype=None).dtype
    assert stored == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_convert_keeps_the_type_and_the_generation_settings(cli, tmp_path):
    model = load(save_model(tmp_path / "a", None)).to(torch.bfloat16)
    model.save(tmp_path / "b")
    assert (
        "no tokenizer travels" in cli("convert", tmp_path / "b", tmp_path / "c", "--to", "hf").err
    )
    assert load(tmp_path / "c").dtype == torch.bfloat16
    assert load(tmp_path / "c").generation == model.generation


TEXTS = dict(vocab_size=40, d_model=16, d_ff=20, num_layers=1, num_heads=2, max_seq_len=32)
IMAGES = dict(d_model=16, d_ff=20, num_layers=2, num_heads=2, image_size=8, patch_size=4)
KINDS = {
    "bert": dict(head="pretraining", **TEXTS),
    "t5": dict(vocab_size=40, d_model=16, head_dim=8, d_ff=20, num_layers=1, num_heads=2),
    "vit": {**IMAGES, "image_size": (8, 12), "num_channels": 1},
    "clip": dict(text=TEXTS, vision=IMAGES),
    "clip_vision_model": IMAGES,
    "llava": dict(text=TEXTS, vision=IMAGES, image_token_id=39),
}


@pytest.mark.parametrize("family", KINDS)
def test_models_of_every_kind_are_verified(cli, tmp_path, monkeypatch, family):
    build(family, seed=0, **KINDS[family]).save(tmp_path / "a")
    found = cli("convert", tmp_path / "a", tmp_path / "b", "--to", "hf", "--verify", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["max_logit_difference"] == 0

    def damaged(source, args):
        model = load(source)
        with torch.no_grad():
            # The last that stands in the file: of two heads, that of the second.
            list(model.parameters())[-1].add_(1)
        model.save(args.dest)

    monkeypatch.setattr(convert, "_to_hf", damaged)
    assert cli("convert", tmp_path / "a", tmp_path / "c", "--to", "hf", "--verify").code == 1


def test_image_settings_travel(cli, tmp_path):
    build("vit", seed=0, **IMAGES).save(tmp_path / "a")
    Processor(size=Exactly(8, 8), resample=3).save(tmp_path / "a")
    assert cli("convert", tmp_path / "a", tmp_path / "b", "--to", "hf").code == 0
    assert Processor.load(tmp_path / "b") == Processor.load(tmp_path / "a")


def test_a_converted_tokenizer_states_the_length_unless_it_did(cli, plain, tmp_path):
    assert "model_max_length" not in tokenizer(plain).config
    assert cli("convert", plain, tmp_path / "a", "--to", "hf").code == 0
    assert tokenizer(tmp_path / "a").config["model_max_length"] == 128
    said = tmp_path / "a" / "tokenizer_config.json"
    said.write_text(said.read_text().replace(": 128", ": 77"))
    assert cli("convert", tmp_path / "a", tmp_path / "b", "--to", "hf").code == 0
    assert tokenizer(tmp_path / "b").config["model_max_length"] == 77


def test_a_wrong_conversion_fails(cli, plain, tmp_path, monkeypatch):
    def damaged(source, args):
        model = load(source)
        with torch.no_grad():
            model.head.weight[3] += 1
        model.save(args.dest)

    monkeypatch.setattr(convert, "_to_hf", damaged)
    found = cli("convert", plain, tmp_path / "out", "--to", "hf", "--verify")
    assert found.code == 1
    assert "differ" in found.err


def test_convert_overwrites_only_with_force(cli, plain, tmp_path):
    command = ("convert", plain, tmp_path / "out", "--to", "hf")
    assert cli(*command).code == 0
    assert "--force" in cli(*command).err
    assert cli(*command, "--force").code == 0
    assert "is the source" in cli("convert", plain, plain, "--to", "hf", "--force").err
    assert "name a directory" in cli("convert", plain, "x.gguf", "--to", "hf").err


def test_info_counts_without_loading(cli, plain):
    found = json.loads(cli("info", plain, "--context", 10, "--json").out)
    model = load(plain)
    assert found["parameters"] == model.num_parameters()
    assert sum(found["parameters_by_part"].values()) == model.num_parameters()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert found["flops_per_token"] == 2 * linear + 4 * 10 * 16 * 2
    assert found["kv_cache_bytes_per_token"]["float32"] == 2 * 2 * 16 * 4
    page = cli("info", plain).out
    assert "2 x" in page
    assert "MultiHeadAttention" in page


def test_info_of_families(cli):
    assert json.loads(cli("info", "gpt2", "--json").out)["parameters"] == 124439808
    assert "vocab_size" in cli("info", "llama").out
    found = cli("info", "llama", "--set", "d_model=x")
    assert found.code == 2
    assert "d_model" in found.err


def test_of_experts_only_those_visited_count():
    model = build(
        "mixtral",
        vocab_size=10,
        d_model=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        num_experts=4,
        top_k=2,
    )
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert figures(model)["matmul_parameters_per_token"] == linear + experts // 2


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("d_model=64", 64),
        ("norm_eps=1e-5", 1e-5),
        ("tie_embeddings=true", True),
        ("num_kv_heads=none", None),
        ("num_kv_heads=2", 2),
        ("qk_norm=head", "head"),
        ("qk_norm=none", None),
        ("layer_types=full_attention,sliding_attention", ("full_attention", "sliding_attention")),
    ],
)
def test_fields_are_typed_by_the_config(word, value):
    assert parse_fields(LlamaConfig, [word]) == {word.partition("=")[0]: value}


@pytest.mark.parametrize("word", ["d_model", "d_modle=3", "d_model=3.5", "tie_embeddings=7"])
def test_fields_that_are_none(word):
    with pytest.raises(ConfigError):
        parse_fields(LlamaConfig, [word])


def test_pull_lists_the_names(cli):
    found = cli("pull")
    assert found.code == 0
    assert "smollm2-135m" in found.out
