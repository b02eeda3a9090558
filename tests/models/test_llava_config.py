"""LLaVA's configuration: what files leave out, what an image takes, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.models.config_json import from_hf
from polyhead.models.llava_config import LlavaConfig

transformers = pytest.importorskip("transformers")

# As https://huggingface.co/llava-hf/llava-1.5-7b-hf has it.
LLAVA_1_5 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
TEXT_KEYS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps""".split()
TOWER_KEYS = """hidden_size intermediate_size num_hidden_layers num_attention_heads image_size
    patch_size num_channels layer_norm_eps""".split()


@pytest.mark.parametrize(
    "data",
    [
        LLAVA_1_5,
        {"model_type": "llava"},
        {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "vision_config": None},
        {"model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {}},
        {"model_type": "llava", "text_config": {"model_type": "qwen3"}, "image_token_id": 7},
        {"model_type": "llava", "vision_config": {"model_type": "vit", "hidden_size": 96}},
    ],
    ids=["llava-1.5", "nothing", "qwen2", "mistral", "qwen3", "vit"],
)
def test_what_a_file_leaves_out_is_what_transformers_says(
    data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(data))
    theirs = transformers.LlavaConfig.from_pretrained(tmp_path)
    ours = from_hf(LlavaConfig, data)
    for mine, their, keys in (
        (ours.text, theirs.text_config, TEXT_KEYS),
        (ours.vision, theirs.vision_config, TOWER_KEYS),
    ):
        assert mine.model_type == their.model_type
        for item in mine.__dataclass_fields__.values():
            for key in {*keys}.intersection(item.metadata.get("keys", ())):
                wanted, found = getattr(their, key, None), getattr(mine, item.name)
                if found is None:
                    found = {"num_kv_heads": "kv_heads", "head_dim": "width"}[item.name]
                    found = getattr(mine, found)
                # Qwen2's config has no width of a head; it follows from the others.
                assert wanted in (found, None), key
    assert ours.image_token_id == theirs.image_token_index
    assert ours.feature_layers == (theirs.vision_feature_layer,)


def test_an_image_of_llava_1_5_is_576_tokens() -> None:
    config = from_hf(LlavaConfig, LLAVA_1_5)
    assert config.tokens_per_image == 576
    assert config.with_room([1, 32000, 5, 32000]) == [1, *[32000] * 576, 5, *[32000] * 576]


SMALL = dict(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=2)
SMALL_TOWER = dict(d_model=6, d_ff=8, num_layers=2, num_heads=3, image_size=4, patch_size=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(feature_layers=(3,)), r"vision_feature_layer is 3; a tower of 2 layers .* -3 to 2"),
        (dict(feature_layers=(-2, -4)), "vision_feature_layer is -4"),
        (dict(feature_layers=()), "vision_feature_layer is empty"),
        (dict(vision={"model_type": "swin"}), "vision_config is of the type 'swin'; llava takes"),
        (dict(text={**SMALL, "model_type": "clip_text_model"}), "'clip_text_model', not a decoder"),
        (dict(text={"model_type": "gemma9"}), "model_type 'gemma9' is not supported"),
        (dict(keep="some"), "keep is 'some'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    parts = dict(text=SMALL, vision=SMALL_TOWER, image_token_id=8)
    ph.build("llava", **parts)
    with pytest.raises(ConfigError, match=words):
        ph.build("llava", **{**parts, **fields})
