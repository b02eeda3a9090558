"""T5, both versions and its encoder alone, equals transformers, both ways."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyhead as ph

transformers = pytest.importorskip("transformers")

from tests.models.family_oracle import (  # noqa: E402
    FamilyCase,
    check_alone,
    check_equal,
    check_round_trip,
    difference,
    texts,
)
from tests.models.seq2seq_oracle import check_padding, check_steps, pairs  # noqa: E402

SIZES: dict[str, Any] = dict(
    vocab_size=53, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4,
    decoder_start_token_id=0, initializer_factor=0.25,
)  # fmt: skip


@dataclass(frozen=True)
class WithOwnHead(FamilyCase):
    """A head trained apart from the embedding, which the config has said since version 5 not."""

    def make(self, seed: int = 0) -> Any:
        model = super().make(seed)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model


def hidden(output: Any) -> torch.Tensor:
    return output.last_hidden_state


def old(name: str, ending: str = "ForConditionalGeneration", **options: Any) -> FamilyCase:
    more: dict[str, Any] = {} if ending.startswith("For") else {"answer": hidden}
    return FamilyCase(f"t5-{name}", f"T5{ending}", {**SIZES, **options}, pairs, **more)


def new(name: str, ending: str = "ForConditionalGeneration", **options: Any) -> FamilyCase:
    sizes = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **options}
    if not ending.startswith("For"):
        return FamilyCase(f"t5-1.1-{name}", f"T5{ending}", sizes, pairs, hidden)
    ignored = frozenset({"tie_word_embeddings"})
    return WithOwnHead(f"t5-1.1-{name}", f"T5{ending}", sizes, pairs, ignore=ignored)


PAIRS = [
    old("plain"),
    old("odd", d_model=27, num_heads=3, d_kv=5, d_ff=17, vocab_size=41),
    old("wide-heads", d_kv=20, num_heads=2),
    old("longer-decoder", num_decoder_layers=3),
    old("shorter-decoder", num_layers=3, num_decoder_layers=1),
    old("few-buckets", relative_attention_num_buckets=8, relative_attention_max_distance=9),
    old("gelu", feed_forward_proj="gelu", layer_norm_epsilon=1e-3),
    old("one-head", num_heads=1, d_kv=32),
    old("no-head", "Model"),
    new("plain"),
    new("odd", d_model=30, num_heads=5, d_kv=3, d_ff=13),
    new("narrow-heads", d_kv=4),
    new("longer-decoder", num_decoder_layers=4, num_layers=1),
    new("silu", feed_forward_proj="gated-silu"),
    new("exact-gelu", feed_forward_proj="gated-gelu", dense_act_fn="gelu"),
    new("many-buckets", relative_attention_num_buckets=40, relative_attention_max_distance=21),
    new("eps", layer_norm_epsilon=1e-2, num_heads=8),
    new("no-head", "Model", num_decoder_layers=1),
]
ALONE = [
    FamilyCase("t5-encoder", "T5EncoderModel", SIZES, texts, hidden),
    FamilyCase(
        "t5-1.1-encoder", "T5EncoderModel",
        {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 12},
        texts, hidden,
    ),
]  # fmt: skip
by_name = pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)


@pytest.mark.parametrize("case", [*PAIRS, *ALONE], ids=lambda case: case.name)
def test_equal_and_back(case: FamilyCase, tmp_path: Path) -> None:
    check_equal(case, tmp_path / "equal")
    check_round_trip(case, tmp_path / "back")


@by_name
def test_padding_on_both_sides_changes_nothing(case: FamilyCase, tmp_path: Path) -> None:
    check_padding(case, tmp_path)


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_an_encoder_alone_reads_rows_as_alone(case: FamilyCase, tmp_path: Path) -> None:
    check_alone(case, tmp_path)


@by_name
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_chunks_and_steps_equal_one_forward(case: FamilyCase, static: bool, tmp_path: Path) -> None:
    check_steps(case, tmp_path, static)


def test_long_texts_reach_the_last_bucket(tmp_path: Path) -> None:
    theirs = PAIRS[0].save(tmp_path)
    ours = ph.load(tmp_path)
    source, target = torch.randint(53, (1, 300)), torch.randint(53, (1, 290))
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits
        assert difference(ours(source, target), expected) <= 1e-5


def test_a_tied_head_that_is_scaled_stays_so_when_trained_apart(tmp_path: Path) -> None:
    # As version 1.0 says, but with a head of its own: transformers keeps the scale.
    theirs = WithOwnHead("apart", "T5ForConditionalGeneration", SIZES, pairs).save(tmp_path)
    assert theirs.config.scale_decoder_outputs
    case = FamilyCase("apart", "T5ForConditionalGeneration", SIZES, pairs)
    ours, inputs = ph.load(tmp_path), pairs(theirs.config, 1)
    assert difference(case.call(ours, inputs), case.expected(theirs, inputs)) <= 1e-5
    ours.save(tmp_path / "again")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert difference(case.expected(again, inputs), case.expected(theirs, inputs)) <= 1e-6


def test_files_of_before_version_5(tmp_path: Path) -> None:
    """They say that the head is not tied, repeat the embedding, and hold an idle table."""
    case = new("old file")
    theirs = case.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors["shared.weight"]
    tensors["encoder.embed_tokens.weight"] = shared.clone()
    tensors["decoder.embed_tokens.weight"] = shared.clone()
    idle = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[idle] = torch.zeros(32, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    said = transformers.T5Config.from_pretrained(tmp_path).to_dict()
    for name in ("dense_act_fn", "is_gated_act", "scale_decoder_outputs", "num_decoder_layers"):
        del said[name]
    said |= {"tie_word_embeddings": False, "n_positions": 512, "output_past": True}
    config.write_text(json.dumps(said))
    inputs = pairs(theirs.config, 2)
    ours = ph.load(tmp_path)
    assert difference(case.call(ours, inputs), case.expected(theirs, inputs)) <= 2e-5


def test_a_fresh_model_begins_as_t5_does() -> None:
    sizes = dict(vocab_size=300, d_model=64, head_dim=16, d_ff=128, num_layers=3, num_heads=4)
    for ours_says, theirs_says in (
        ({}, {}),
        (
            {"feed_forward": "gated-gelu", "tie_embeddings": False},
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ),
    ):
        ours = ph.build("t5", seed=0, **sizes, **ours_says)
        renamed = {"d_kv" if name == "head_dim" else name: n for name, n in sizes.items()}
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**renamed, **theirs_says)
        )
        named = theirs.state_dict()
        for name, tensor in ours.hf_tensors().items():
            if "norm" not in name and name != "lm_head.weight":
                assert 0.8 < tensor.std() / named[name].std() < 1.25, name


def test_a_fresh_model_loads_in_transformers(tmp_path: Path) -> None:
    ours = ph.build("t5", seed=3, vocab_size=41, d_model=24, head_dim=8, d_ff=30, num_layers=2,
                    num_heads=2, feed_forward="gated-silu").eval()  # fmt: skip
    ours.save(tmp_path / "both")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "both").eval()
    inputs = pairs(theirs.config, 3)
    with torch.no_grad():
        assert difference(ours(**inputs), theirs(**inputs).logits) <= 1e-5
    alone = ph.build("t5", head="none", seed=3, kind="encoder", vocab_size=41, d_model=24,
                     head_dim=8, d_ff=30, num_layers=2, num_heads=2).eval()  # fmt: skip
    alone.save(tmp_path / "alone")
    there = transformers.T5EncoderModel.from_pretrained(tmp_path / "alone").eval()
    again = ph.load(tmp_path / "alone")
    with torch.no_grad():
        expected = there(inputs["input_ids"]).last_hidden_state
        assert difference(alone(inputs["input_ids"]), expected) <= 1e-5
        assert difference(again(inputs["input_ids"]), expected) <= 1e-5


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (dict(feed_forward="doubled-gelu"), "use relu or gated-gelu"),
        (dict(feed_forward="gated-snake"), "activation 'snake'"),
        (dict(num_buckets=32, max_distance=16), "max_distance above half"),
        (dict(kind="decoder"), "choose encoder-decoder or encoder"),
        (dict(kind="encoder"), "head='none'"),
    ],
)
def test_what_cannot_be_is_one_line(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ph.ConfigError, match=why):
        ph.build("t5", **said)
