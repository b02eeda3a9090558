"""Marian equals transformers, both ways, with every arrangement of its embeddings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyhead as ph

transformers = pytest.importorskip("transformers")

from tests.models.family_oracle import FamilyCase, check_equal, check_round_trip, difference  # noqa: E402
from tests.models.seq2seq_oracle import check_padding, check_steps, pairs  # noqa: E402

SIZES: dict[str, Any] = dict(
    vocab_size=53, d_model=32, encoder_ffn_dim=40, decoder_ffn_dim=40, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    max_position_embeddings=64, pad_token_id=52, decoder_start_token_id=52, eos_token_id=0,
    init_std=0.05,
)  # fmt: skip


@dataclass(frozen=True)
class MarianCase(FamilyCase):
    """With a bias on the logits, which is no parameter there, and with its sinusoids."""

    def make(self, seed: int = 0) -> Any:
        model = super().make(seed)
        for part in model.modules():
            if hasattr(part, "create_weight"):
                part.weight.data = part.create_weight()
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        return model


def case(name: str, **options: Any) -> FamilyCase:
    return MarianCase(f"marian-{name}", "MarianMTModel", {**SIZES, **options}, pairs)


def apart(**options: Any) -> dict[str, Any]:
    return {"share_encoder_decoder_embeddings": False, **options}


CASES = [
    case("plain"),
    case("scaled-swish", scale_embedding=True, activation_function="swish"),
    case("odd", d_model=27, encoder_attention_heads=3, decoder_attention_heads=9),
    case("longer-decoder", decoder_layers=4, encoder_layers=1),
    case("shallow-decoder", decoder_layers=1, encoder_layers=3, activation_function="relu"),
    case("uneven-heads", encoder_attention_heads=8, decoder_attention_heads=2),
    case("uneven-widths", encoder_ffn_dim=17, decoder_ffn_dim=64),
    case(
        "two-vocabularies",
        **apart(decoder_vocab_size=37, pad_token_id=30, decoder_start_token_id=30),
    ),
    case("two-tables", **apart(scale_embedding=True)),
    case("own-head", **apart(decoder_vocab_size=61, tie_word_embeddings=False)),
]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_equal_and_back(case: FamilyCase, tmp_path: Path) -> None:
    check_equal(case, tmp_path / "equal")
    check_round_trip(case, tmp_path / "back")


@by_name
def test_padding_on_both_sides_changes_nothing(case: FamilyCase, tmp_path: Path) -> None:
    check_padding(case, tmp_path)


@by_name
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_chunks_and_steps_equal_one_forward(case: FamilyCase, static: bool, tmp_path: Path) -> None:
    check_steps(case, tmp_path, static)


def test_sinusoids_stay_exact_far_out(tmp_path: Path) -> None:
    theirs = case("long", max_position_embeddings=2048, d_model=30,
                  encoder_attention_heads=2, decoder_attention_heads=2).save(tmp_path)  # fmt: skip
    ours: Any = ph.load(tmp_path)
    at = torch.arange(2048)
    expected = theirs.model.encoder.embed_positions.weight
    assert difference(ours.backbone.encoder.positions(at), expected) <= 2e-7


def test_without_a_head_its_positions_are_not_written(tmp_path: Path) -> None:
    one = MarianCase("headless", "MarianModel", SIZES, pairs)
    theirs = one.save(tmp_path / "theirs")
    ours = ph.load(tmp_path / "theirs")
    inputs = pairs(theirs.config, 1)
    assert difference(one.call(ours, inputs), one.expected(theirs, inputs)) <= 1e-5
    ours.save(tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    positions = {f"{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    assert before.keys() - after.keys() == positions
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    again = transformers.MarianModel.from_pretrained(tmp_path / "ours").eval()
    assert difference(one.expected(again, inputs), one.expected(theirs, inputs)) <= 1e-6


def test_files_as_opus_published_them(tmp_path: Path) -> None:
    """Every table repeated, sinusoids stored, and a config of another time."""
    one = case("opus", scale_embedding=True, activation_function="swish")
    theirs = one.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["model.shared.weight"].clone()
    for stack in ("encoder", "decoder"):
        stored = theirs.get_submodule(f"model.{stack}.embed_positions").weight
        tensors[f"model.{stack}.embed_positions.weight"] = stored.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    said = json.loads(config.read_text())
    del said["share_encoder_decoder_embeddings"], said["decoder_vocab_size"]
    said |= {
        "add_bias_logits": False, "add_final_layer_norm": False, "classif_dropout": 0.0,
        "normalize_before": False, "normalize_embedding": False, "num_hidden_layers": 6,
        "static_position_embeddings": True, "bad_words_ids": [[52]], "num_beams": 6,
        "max_length": 512, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    }  # fmt: skip
    config.write_text(json.dumps(said))
    ours, inputs = ph.load(tmp_path), pairs(theirs.config, 2)
    assert difference(one.call(ours, inputs), one.expected(theirs, inputs)) <= 1e-5


def test_untied_tables_of_one_vocabulary(tmp_path: Path) -> None:
    # Since version 5, tie_word_embeddings=False unties the encoder's and the decoder's, too.
    one = case("untied", tie_word_embeddings=False)
    theirs = one.save(tmp_path)
    ours, inputs = ph.load(tmp_path), pairs(theirs.config, 1)
    assert difference(one.call(ours, inputs), one.expected(theirs, inputs)) <= 1e-5


def test_a_fresh_model_loads_in_transformers(tmp_path: Path) -> None:
    ours = ph.build("marian", seed=0, vocab_size=41, d_model=24, d_ff=30, num_layers=2,
                    num_heads=2, num_decoder_layers=1).eval()  # fmt: skip
    ours.save(tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs = pairs(theirs.config, 3)
    with torch.no_grad():
        assert difference(ours(**inputs), theirs(**inputs).logits) <= 1e-5


def test_heads_that_do_not_divide_are_one_line() -> None:
    with pytest.raises(ph.ConfigError, match="d_model 32 does not divide into 5 heads"):
        ph.build("marian", d_model=32, num_heads=4, num_decoder_heads=5)
