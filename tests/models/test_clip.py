"""CLIP equals transformers: both towers, the scores, and the files both ways."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyhead as ph
from polyhead.errors import ConfigError

transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
EOS = 49
TEXT = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=16,
    projection_dim=7,
    bos_token_id=48,
    eos_token_id=EOS,
    pad_token_id=EOS,
)
VISION = dict(
    hidden_size=20,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
    projection_dim=7,
)


@dataclass(frozen=True)
class Case:
    name: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    both: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        config = transformers.CLIPConfig(
            text_config={**TEXT, **self.text},
            vision_config={**VISION, **self.vision},
            **{"projection_dim": 10, **self.both},
        )
        return shaken(transformers.CLIPModel(config))

    def inputs(self) -> tuple[Tensor, Tensor]:
        vision = {"num_channels": 3, **VISION, **self.vision}
        ids = torch.randint(0, EOS, (3, 11))
        # The first end counts: where padding is the same token, more of it follows.
        ids[0, 10:], ids[1, 4:], ids[2, 7:] = EOS, EOS, EOS
        return ids, torch.randn(4, vision["num_channels"], *[vision["image_size"]] * 2)


def shaken(model: Any) -> Any:
    """Weights that no rule can leave out unnoticed: norms and biases are not ones and zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


CASES = [
    Case("plain"),
    Case("legacy-eos", dict(eos_token_id=2)),
    Case("gelu", dict(hidden_act="gelu"), dict(hidden_act="gelu_new")),
    Case(
        "odd-widths",
        dict(hidden_size=15, num_attention_heads=5),
        dict(hidden_size=27, num_attention_heads=3),
    ),
    Case("edges-cut", vision=dict(image_size=14, patch_size=4, num_hidden_layers=1)),
    Case("one-patch-one-channel", vision=dict(image_size=5, patch_size=5, num_channels=1)),
    Case("tiny-patches", vision=dict(image_size=10, patch_size=2, intermediate_size=11)),
    Case("scale-and-space", both=dict(projection_dim=33, logit_scale_init_value=4.6)),
    Case("eps", dict(layer_norm_eps=1e-2), dict(layer_norm_eps=1e-3)),
    Case("deep-text", dict(num_hidden_layers=5, intermediate_size=9, max_position_embeddings=11)),
]

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same_files(one: Path, other: Path) -> None:
    before, after = (load_file(place / "model.safetensors") for place in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert file(one) == file(other)


@by_name
@torch.no_grad()
def test_towers_and_scores_equal(case: Case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    ours = ph.load(tmp_path)
    ids, images = case.inputs()
    mask = (torch.arange(11) < torch.tensor([[11], [5], [8]])).long()

    hidden = ours.backbone.text(ids)
    assert difference(hidden, theirs.text_model(ids).last_hidden_state) <= CLOSE
    hidden = ours.backbone.vision(images)
    assert difference(hidden, theirs.vision_model(images).last_hidden_state) <= CLOSE
    for given in (None, mask):
        wanted = theirs.get_text_features(ids, given).pooler_output
        assert difference(ours.encode_text(ids, given), wanted) <= CLOSE
        said = theirs(input_ids=ids, pixel_values=images, attention_mask=given)
        assert difference(ours(ids, images, given), said.logits_per_text) <= 2 * CLOSE
        assert difference(ours(ids, images, given).T, said.logits_per_image) <= 2 * CLOSE
    features = theirs.get_image_features(images).pooler_output
    assert difference(ours.encode_image(images), features) <= CLOSE


@by_name
@torch.no_grad()
def test_files_go_both_ways(case: Case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path / "theirs")
    ph.load(tmp_path / "theirs").save(tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    ids, images = case.inputs()
    said, wanted = (each(input_ids=ids, pixel_values=images) for each in (again, theirs))
    assert torch.equal(said.logits_per_text, wanted.logits_per_text)


@by_name
@torch.no_grad()
def test_a_fresh_model_loads_there(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path / "theirs")
    like = ph.load(tmp_path / "theirs").config
    names = ("text", "vision", "projection_dim", "logit_scale_init")
    fresh = ph.build("clip", seed=3, **{name: getattr(like, name) for name in names}).eval()
    fresh.save(tmp_path / "fresh")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "fresh").eval()
    ids, images = case.inputs()
    said = theirs(input_ids=ids, pixel_values=images).logits_per_text
    assert difference(fresh(ids, images), said) <= CLOSE


@pytest.mark.parametrize("eos", [EOS, 2])
@torch.no_grad()
def test_a_text_alone_equals_the_text_in_a_batch(eos: int, tmp_path: Path) -> None:
    Case("", dict(eos_token_id=eos)).make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    ids, _ = CASES[0].inputs()
    lengths = (11, 5, 8)
    for padding in (EOS, 0):
        right, left = torch.full((3, 11), padding), torch.full((3, 11), padding)
        for row, length in enumerate(lengths):
            right[row, :length] = ids[row, :length]
            left[row, 11 - length :] = ids[row, :length]
        keep = torch.arange(11) < torch.tensor(lengths)[:, None]
        batches = (model.encode_text(right, keep), model.encode_text(left, keep.flip(1)))
        for row, length in enumerate(lengths):
            alone = model.encode_text(ids[row : row + 1, :length])[0]
            assert all(difference(batch[row], alone) <= CLOSE for batch in batches)


@pytest.mark.parametrize("projected", [False, True], ids=["bare", "projected"])
@torch.no_grad()
def test_the_text_tower_alone(projected: bool, tmp_path: Path) -> None:
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    theirs = shaken(kind(transformers.CLIPTextConfig(**TEXT)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ph.load(tmp_path / "theirs")
    ids, _ = CASES[0].inputs()
    wanted = theirs(ids)
    assert difference(ours.backbone(ids), wanted.last_hidden_state) <= CLOSE
    if projected:
        assert difference(ours(ids), wanted.text_embeds) <= CLOSE
    else:
        assert difference(ours.backbone.pooled(ids), wanted.pooler_output) <= CLOSE
    ours.save(tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("projected", [False, True], ids=["bare", "projected"])
@torch.no_grad()
def test_the_image_tower_alone(projected: bool, tmp_path: Path) -> None:
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    theirs = shaken(kind(transformers.CLIPVisionConfig(**VISION)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ph.load(tmp_path / "theirs")
    _, images = CASES[0].inputs()
    wanted = theirs(images)
    assert difference(ours.backbone(images), wanted.last_hidden_state) <= CLOSE
    if projected:
        assert difference(ours(images), wanted.image_embeds) <= CLOSE
    else:
        assert difference(ours.pooler(ours(images)), wanted.pooler_output) <= CLOSE
    ours.save(tmp_path / "ours")
    same_files(tmp_path / "theirs", tmp_path / "ours")


@torch.no_grad()
def test_older_files_of_the_image_tower(tmp_path: Path) -> None:
    """Before transformers 5 the bare tower stood under `vision_model.`, with a buffer."""
    theirs = shaken(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {f"vision_model.{name}": value for name, value in weights.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    _, images = CASES[0].inputs()
    assert difference(ph.load(tmp_path)(images), theirs(images).last_hidden_state) <= CLOSE


def test_what_a_file_leaves_out_is_what_transformers_says(tmp_path: Path) -> None:
    data = {"model_type": "clip", "text_config": {"hidden_size": 64}, "vision_config": None}
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = transformers.CLIPConfig.from_pretrained(tmp_path)
    ours = from_hf_file(tmp_path)
    for part, keys in (
        ("text", "vocab_size max_position_embeddings eos_token_id"),
        ("vision", "image_size patch_size num_channels"),
    ):
        shared = "hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act"
        mine, their = getattr(ours, part), getattr(theirs, part + "_config")
        names = {
            key: item.name
            for item in mine.__dataclass_fields__.values()
            for key in item.metadata.get("keys", ())
        }
        for key in f"{shared} layer_norm_eps {keys}".split():
            assert getattr(mine, names[key]) == getattr(their, key), key
    assert ours.projection_dim == theirs.projection_dim
    assert ours.logit_scale_init == theirs.logit_scale_init_value


# What transformers 4 wrote of a tower beyond its sizes.
VERSION_4 = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None,
    "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None,
    "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False,
    "transformers_version": "4.24.0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def test_the_older_key_of_a_tower_wins(tmp_path: Path) -> None:
    """`text_config_dict`, where it says anything, replaces the whole of `text_config`."""
    data = {
        "model_type": "clip",
        "text_config": {**VERSION_4, **TEXT},
        "text_config_dict": {**VERSION_4, "hidden_size": 48, "num_attention_heads": 4},
        "vision_config": {**VERSION_4, **VISION, "vocab_size": 9},
        "vision_config_dict": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = transformers.CLIPConfig.from_pretrained(tmp_path)
    ours = from_hf_file(tmp_path)
    assert ours.text.d_model == theirs.text_config.hidden_size == 48
    assert ours.text.eos_token_id == theirs.text_config.eos_token_id == 49407
    assert ours.vision.d_model == theirs.vision_config.hidden_size == VISION["hidden_size"]


def from_hf_file(folder: Path) -> Any:
    from polyhead.models.config_json import from_hf, to_hf
    from polyhead.models.registry import family_of

    data = file(folder)
    config = from_hf(family_of(data["model_type"]).config, data)
    assert {**data, "architectures": ["CLIPModel"]} == to_hf(config)
    return config


def test_a_tower_from_its_fields() -> None:
    text = dict(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=2, max_seq_len=5)
    vision = dict(d_model=6, d_ff=8, num_layers=1, num_heads=3, image_size=4, patch_size=2)
    model = ph.build("clip", text=text, vision=vision, projection_dim=3)
    assert model(torch.ones(2, 4, dtype=torch.long), torch.randn(5, 3, 4, 4)).shape == (2, 5)
    with pytest.raises(ConfigError, match="clip_text_model has no field 'heads'"):
        ph.build("clip", text=dict(text, heads=2), vision=vision)
    with pytest.raises(ConfigError, match="d_model 8 does not divide into 3 heads"):
        ph.build("clip", text=dict(text, num_heads=3), vision=vision)
    with pytest.raises(ConfigError, match="patch_size is 5; it must be from 1 to 4"):
        ph.build("clip", text=text, vision=dict(vision, patch_size=5))
    with pytest.raises(ConfigError, match="projection_dim is 0"):
        ph.build("clip", text=text, vision=vision, projection_dim=0)


def test_images_of_another_size_are_refused() -> None:
    model = ph.build("clip_vision_model", d_model=6, d_ff=8, num_layers=1, num_heads=3,
                     image_size=8, patch_size=4)  # fmt: skip
    with pytest.raises(ValueError, match=r"have 3 x 2 patches and this model takes 2 x 2"):
        model(torch.randn(1, 3, 12, 8))


@torch.no_grad()
def test_every_map_can_be_captured(tmp_path: Path) -> None:
    CASES[0].make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    ids, images = CASES[0].inputs()
    with ph.capture(model) as seen:
        model(ids, images)
    shapes = sorted(tuple(maps.shape) for maps in seen.values())
    assert shapes == sorted([(3, 3, 11, 11)] * 2 + [(4, 2, 10, 10)] * 3)
