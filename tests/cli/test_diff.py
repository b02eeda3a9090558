"""`polyhead diff` says what the papers say."""

import json

import pytest
import torch

import polyhead as ph
from polyhead.cli.anatomy import anatomy
from polyhead.cli.reasons import REASONS
from polyhead.models.presets import PRESETS, preset


def rows(cli, *words: object) -> dict[tuple[str, str], dict[str, str]]:
    found = cli("diff", *words, "--json")
    assert found.code == 0, found.err
    return {(row["part"], row["name"]): row for row in json.loads(found.out)["rows"]}


# (A, B): what the papers of the second say that it changed, and what they left alone.
KNOWN = {
    ("window_mlp", "lstm"): (
        {("recurrence", "kind"): (None, "LSTM")},
        [("attention", "sees"), ("norm", "where"), ("parameters", "of layers")],
    ),
    ("bert", "roberta"): (
        {("embedding", "token types"): ("2", "1"), ("position", "kind"): ("512", "514")},
        [("norm", "kind"), ("attention", "heads"), ("feed-forward", "activation")],
    ),
    ("bert", "albert"): (
        {
            ("sharing", "layers"): ("none", "12 layers share 1"),
            ("embedding", "tokens"): ("30,522 × 768", "30,000 × 128, widened to 768"),
            ("parameters", "of layers"): ("85,054,464", "7,087,872"),
        },
        [("layers", "number"), ("layers", "width"), ("norm", "where")],
    ),
    ("bert", "distilbert"): (
        {("layers", "number"): ("12", "6"), ("embedding", "token types"): ("2", "none")},
        [("layers", "width"), ("attention", "heads"), ("feed-forward", "width")],
    ),
    ("bert", "deberta-v3"): (
        {
            ("position", "kind"): ("learned", "disentangled"),
            ("attention", "scale"): ("1/√64", "1/√192"),
            ("training", "objective"): ("masked LM", "replaced-token"),
        },
        [("norm", "where"), ("layers", "number")],
    ),
    ("gpt2", "llama"): (
        {
            ("norm", "kind"): ("LayerNorm", "RMSNorm"),
            ("position", "kind"): ("learned", "rotary"),
            ("attention", "kv heads"): ("as many", "8, each for 4"),
            ("attention", "biases"): ("q, k, v, out", "none"),
            ("feed-forward", "kind"): ("FeedForward", "GatedFeedForward"),
            ("feed-forward", "activation"): ("gelu_tanh", "silu"),
            ("sharing", "head and embedding"): ("one table", "apart"),
        },
        [("norm", "where"), ("norm", "final"), ("attention", "sees")],
    ),
    ("llama", "mixtral"): (
        {("feed-forward", "experts"): ("none", "8, 2 a token")},
        [("feed-forward", "gate"), ("feed-forward", "width"), ("attention", "kv heads")],
    ),
    ("qwen2", "qwen3"): (
        {
            ("attention", "norm of q, k"): ("no", "yes"),
            ("attention", "biases"): ("q, k, v", "none"),
        },
        [("norm", "kind"), ("sharing", "head and embedding")],
    ),
    ("t5", "flan-t5"): (
        {
            ("feed-forward", "gate"): ("no", "yes"),
            ("feed-forward", "activation"): ("relu", "gelu_tanh"),
            ("sharing", "head and embedding"): ("one table", "apart"),
        },
        [("position", "kind"), ("attention", "scale"), ("norm", "kind")],
    ),
    ("vit", "swin"): (
        {
            ("attention", "sees"): ("all", "windows of 7 × 7"),
            ("attention", "heads"): ("12", "3 / 6 / 12 / 24"),
            ("layers", "beside"): (None, "merge"),
        },
        [("norm", "where"), ("feed-forward", "kind")],
    ),
    ("vit", "dinov2"): (
        {("layers", "beside"): (None, "scale"), ("embedding", "patches"): ("16", "14 × 14")},
        [("attention", "heads")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", KNOWN, ids="-".join)
def test_what_the_papers_changed(cli, pair):
    changed, same = KNOWN[pair]
    found = rows(cli, *pair)
    for key, (before, after) in changed.items():
        row = found[key]
        assert row["a"] is None if before is None else before in row["a"]
        assert after in row["b"]
        assert row["why"] or key[0] == "parameters", key
    assert not found.keys() & set(same)


def test_the_table_is_read_off_the_model(cli, tmp_path):
    sizes = dict(vocab_size=50, d_model=12, d_ff=20, num_layers=2, num_heads=3, max_seq_len=9)
    ph.build("bert", seed=0, **sizes).save(tmp_path / "a")
    ph.build("bert", seed=0, **{**sizes, "num_layers": 3, "activation": "relu"}).save(
        tmp_path / "b"
    )
    # Four products of attention, two of the feed-forward, two norms, all with biases.
    layer = 4 * (12 * 12 + 12) + (12 * 20 + 20) + (20 * 12 + 12) + 2 * (12 + 12)
    found = rows(cli, tmp_path / "a", tmp_path / "b")
    assert {key: (row["a"], row["b"]) for key, row in found.items()} == {
        ("layers", "number"): ("2", "3"),
        ("feed-forward", "activation"): ("gelu", "relu"),
        ("parameters", "all"): (found["parameters", "all"]["a"], found["parameters", "all"]["b"]),
        ("parameters", "of layers"): (f"{2 * layer:,}", f"{3 * layer:,}"),
    }
    every = rows(cli, tmp_path / "a", tmp_path / "b", "--all")
    assert len(every) > 20
    assert every["norm", "where"]["a"] == "after each part"


def test_pages(cli, tmp_path):
    page = cli("diff", "gpt2", "llama").out
    assert "meta-llama/Llama-3.1-8B" in page
    assert "RMSNorm" in page
    found = cli("diff", "gpt2", "gpt2")
    assert (found.code, found.out) == (0, "")
    assert "the same parts" in found.err
    found = cli("diff", "gpt2", "gtp2")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    found = cli("diff", "gpt2", "qwen2_moe")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert "needs a value" in found.err


def test_every_reason_is_of_a_fact_that_there_is():
    with torch.device("meta"):
        models = [ph.build(**row.arguments()) for row in PRESETS.values()]
        models += [ph.build(family) for family in ("window_mlp", "lstm")]
    facts = {(fact.part, fact.name) for model in models for fact in anatomy(model)}
    assert {key for key in REASONS if key[0] != "training"} <= facts


def test_info_of_a_published_model(cli):
    found = json.loads(cli("info", "deberta-v3", "--json").out)
    assert found["checkpoint"] == "microsoft/deberta-v3-base"
    assert "microsoft/deberta-v3-base" in cli("info", "deberta-v3").out
    assert len(cli("info", "vit").out) < 6000


def test_an_unknown_preset_says_which_there_are():
    with pytest.raises(ph.ConfigError, match="there are bert, roberta"):
        preset("gpt5")
