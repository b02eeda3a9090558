"""`config.json` in and out: what is read, what is kept, what is refused."""

from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.models.config import Config
from polyhead.models.config_json import from_hf, to_hf
from polyhead.models.llama import Llama
from polyhead.models.llama_config import LlamaConfig
from polyhead.models.registry import families, family_of
from polyhead.models.rope import make_rotary, read_scaling

LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
SIZES = dict(vocab_size=32, d_model=16, d_ff=24, num_layers=4, num_heads=4)


def read(**changes: Any) -> LlamaConfig:
    data = {**LLAMA, **changes}
    config = from_hf(family_of(data["model_type"]).config, data)
    assert isinstance(config, LlamaConfig)
    return config


def test_fields_come_from_their_keys() -> None:
    config = read(rope_theta=500.0, tie_word_embeddings=True, attention_bias=True, head_dim=6)
    assert (config.vocab_size, config.d_model, config.d_ff, config.num_layers) == (32, 16, 24, 4)
    assert (config.num_heads, config.kv_heads, config.width, config.max_seq_len) == (4, 2, 6, 64)
    assert (config.norm_eps, config.rope_base, config.activation) == (1e-5, 500.0, "silu")
    assert config.tie_embeddings
    assert config.qkv_bias
    assert config.out_bias


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda scaling: scaling.get("rope_type", "none"),
)
def test_version_4_and_version_5_say_the_same(scaling: dict[str, Any]) -> None:
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    configs = [
        read(rope_parameters={"rope_theta": 500.0, **scaling}),
        read(rope_theta=500.0, rope_scaling=scaling or None),
        read(rope_theta=500.0, rope_scaling=old or None),
        read(rope_theta=500.0, rope_scaling={**scaling, **old} or None),
    ]
    assert all(config == configs[0] for config in configs)
    assert configs[0].rope_base == 500.0
    turns = [
        make_rotary(4, config.rope_base, config.rope_scaling, config.max_seq_len).angles(
            torch.arange(50)[None]
        )
        for config in configs
    ]
    assert all(torch.equal(cos, turns[0][0]) for cos, _ in turns)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (dict(model_type="mistral", sliding_window=5), [5, 5, 5, 5]),
        (dict(sliding_window=None), [None] * 4),
        (dict(model_type="mistral"), [4096] * 4),
        (dict(model_type="qwen2", sliding_window=5), [None] * 4),
        (
            dict(
                model_type="qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=3
            ),
            [None, None, None, 5],
        ),
        (
            dict(
                model_type="qwen3",
                sliding_window=5,
                use_sliding_window=True,
                max_window_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            [5, None, 5, None],
        ),
    ],
)
def test_windows(changes: dict[str, Any], windows: list[int | None]) -> None:
    assert read(**changes).windows == windows


ALIEN = [
    ("attention_multiplier", 0.5),
    ("logits_scaling", 8),
    ("final_logit_softcapping", 30.0),
    ("qk_layernorm", True),
    ("num_local_experts", 4),
    ("layer_scale", [1.0]),
    ("clip_qkv", 0),
]


@pytest.mark.parametrize(("key", "value"), ALIEN, ids=[key for key, _ in ALIEN])
def test_a_key_that_nothing_reads_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}'.*may change the numbers; remove it"):
        read(**{key: value})
    # Switched off, or left to a default, it changes nothing.
    assert read(**{key: None}) == read() == read(**{key: False})


def test_what_is_harmless_is_kept_and_written_back() -> None:
    extra = dict(
        transformers_version="5.0",
        bos_token_id=1,
        eos_token_id=[2, 3],
        torch_dtype="bfloat16",
        use_cache=True,
        _name_or_path="somewhere",
        some_switch=None,
    )
    data = {**LLAMA, **extra}
    config = from_hf(LlamaConfig, data)
    assert to_hf(config) == data
    assert config == read()  # what says nothing about the numbers does not tell configs apart


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(rope_theta=1e6),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        dict(rope_scaling={"type": "linear", "factor": 2.0}),
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}),
        dict(hidden_act="gelu_pytorch_tanh", model_type="mistral", sliding_window=3),
        dict(model_type="qwen2", use_sliding_window=False),
        dict(model_type="mistral", sliding_window=None),
    ],
    ids=str,
)
def test_what_was_read_is_written_as_it_was(changes: dict[str, Any]) -> None:
    data = {**LLAMA, **changes}
    config = read(**changes)
    assert to_hf(config) == data
    assert from_hf(type(config), to_hf(config)) == config


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(num_kv_heads=2, rope_base=7.0, norm_eps=1e-3, tie_embeddings=True, activation="relu"),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}, max_seq_len=8, head_dim=6),
        dict(window=3, layer_types=("full_attention", "sliding_attention") * 2, use_window=True),
    ],
    ids=["plain", "numbers", "rope", "windows"],
)
def test_a_fresh_config_survives_its_file(model_type: str, fields: dict[str, Any]) -> None:
    config = LlamaConfig.fresh(model_type, **SIZES, **fields)
    data = to_hf(config)
    again = from_hf(LlamaConfig, data)
    assert again == config
    assert to_hf(again) == data


def test_a_changed_config_writes_its_changes() -> None:
    from dataclasses import replace

    config = replace(read(rope_parameters={"rope_theta": 5.0}), rope_base=9.0, num_layers=2)
    data = to_hf(config)
    assert data["rope_parameters"] == {"rope_theta": 9.0}
    assert data["num_hidden_layers"] == 2
    assert config.source["rope_parameters"] == {"rope_theta": 5.0}
    assert from_hf(LlamaConfig, data) == config


SLIDES = dict(model_type="qwen2")
IMPOSSIBLE = [
    (dict(sliding_window=4), "config.json has 'sliding_window': 4"),
    (dict(num_hidden_layers=0), "num_layers is 0; it must be from 1 to 4096"),
    (dict(num_hidden_layers=10**9), "num_layers is 1000000000; it must be from 1 to 4096"),
    (dict(hidden_size=-16), "d_model is -16"),
    (dict(hidden_size="16"), "d_model is '16'; it must be a whole number"),
    (dict(hidden_size=16.0), "d_model is 16.0; it must be a whole number"),
    (dict(vocab_size=True), "vocab_size is True"),
    (dict(vocab_size=None), "vocab_size is None"),
    (dict(max_position_embeddings=0), "max_seq_len is 0"),
    (dict(hidden_size=18), "d_model 18 does not divide into 4 heads"),
    (dict(num_key_value_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
    (dict(num_key_value_heads=0), "num_kv_heads is 0"),
    (dict(head_dim=5), "head_dim is 5; rotary positions need an even number"),
    (dict(rms_norm_eps="small"), "norm_eps is 'small'; it must be a finite number"),
    (dict(rms_norm_eps=float("nan")), "norm_eps is nan"),
    (dict(tie_word_embeddings="yes"), "tie_embeddings is 'yes'; it must be true or false"),
    (dict(attention_dropout=1.5), "dropout is 1.5; it must be from 0 to below 1"),
    (dict(model_type="mistral", sliding_window=-3), "window is -3"),
    (
        dict(model_type="mistral", sliding_window="wide"),
        "window is 'wide'; it must be a whole number or nothing",
    ),
    (dict(hidden_act="mish"), "activation 'mish' is not one of relu, gelu"),
    (dict(hidden_act=["silu"]), "config.json has 'hidden_act'"),
    (dict(**SLIDES, layer_types=["full_attention"]), "layer_types names 1 layers of 4"),
    (
        dict(**SLIDES, layer_types=["chunked_attention"] * 4),
        "'chunked_attention' is not full_attention",
    ),
    (dict(**SLIDES, layer_types=3), "config.json has 'layer_types': 3"),
    (dict(**SLIDES, layer_types=[["full_attention"]] * 4), "layer_types is"),
    (dict(rope_theta=0), "base of the rotary positions is 0"),
    (dict(rope_theta="10000"), "rope_base is '10000'"),
    (dict(rope_scaling=3), "config.json has 'rope_scaling': 3"),
    (dict(rope_scaling={"type": "longrope", "factor": 2}), "rope scaling 'longrope' is not one of"),
    (dict(rope_scaling={"type": ["x"]}), "is not one of"),
    (dict(rope_scaling={"type": "linear"}), "rope scaling 'linear' needs 'factor'"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "'factor': 0; it must be a number above"),
    (dict(rope_scaling={"type": "dynamic", "factor": "2"}), "'factor': '2'; it must be a number"),
    (
        dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        "rope scaling 'llama3' needs 'high_freq_factor'",
    ),
    (
        dict(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 3}),
        "rope scaling 'linear' has 'beta_fast', which nothing here reads",
    ),
    (
        dict(rope_parameters={"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        "'partial_rotary_factor', which nothing here reads",
    ),
    (
        dict(rope_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}),
        "'original_max_position_embeddings': 0",
    ),
]


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=[words for _, words in IMPOSSIBLE])
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        Llama(read(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_key_is_named(key: str) -> None:
    data = {name: value for name, value in LLAMA.items() if name != key}
    with pytest.raises(ConfigError, match=f"no '{key}'; it is needed"):
        from_hf(LlamaConfig, data)


def test_a_type_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'gemma9' is not supported; Polyhead knows .*llama"):
        family_of("gemma9")
    with pytest.raises(ConfigError, match="'gemma9' is not supported"):
        ph.build("gemma9", **SIZES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(d_modle=16), "llama has no field 'd_modle'; it has .*d_model"),
        (dict(source={}), "llama has no field 'source'"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(rope_base="ten"), "rope_base is 'ten'"),
    ],
)
def test_building_refuses_what_it_does_not_know(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ph.build("llama", **{**SIZES, **fields})


def test_building_names_what_is_missing_or_fixed_by_the_type() -> None:
    with pytest.raises(ConfigError, match="llama needs a value for vocab_size, d_model"):
        ph.build("llama", num_layers=1)
    with pytest.raises(ConfigError, match="qkv_bias is True in qwen2, not False"):
        ph.build("qwen2", **SIZES, qkv_bias=False)


@pytest.mark.parametrize("model_type", families())
def test_every_family_s_config_is_a_frozen_value(model_type: str) -> None:
    kind = family_of(model_type).config
    assert issubclass(kind, Config)
    assert kind.row(model_type).model_type == model_type
    assert kind.__dataclass_params__.frozen  # pyright: ignore[reportAttributeAccessIssue]
    keys = [set(f.metadata.get("keys", ())) for f in kind.__dataclass_fields__.values()]
    assert any(keys)


def test_plain_rotary_ignores_what_belongs_to_the_scaled_kinds() -> None:
    assert read_scaling({"rope_type": "default", "factor": 8.0}) is None
    assert read_scaling(None) is None
    assert read_scaling({}) is None


# What stands in published files beyond what transformers writes today.
PUBLISHED: dict[str, dict[str, Any]] = {
    "bert": {
        "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform", "_num_labels": 5, "output_past": True,
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
        "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
    },
    "xlm-roberta": {"language": "english", "name": "XLMRoberta", "output_past": True},
    "distilbert": {"output_past": True, "finetuning_task": "sst-2", "tie_weights_": True},
    "albert": {"num_memory_blocks": 0, "gap_size": 0, "layers_to_keep": [], "down_scale_factor": 1},
    "marian": {
        "_num_labels": 3, "add_bias_logits": False, "add_final_layer_norm": False,
        "extra_pos_embeddings": 58101, "normalize_before": False, "normalize_embedding": False,
        "static_position_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_what_published_files_also_say_is_kept(model_type: str) -> None:
    data = {"model_type": model_type, "architectures": [], **PUBLISHED[model_type]}
    config = from_hf(family_of(model_type).config, data)
    assert PUBLISHED[model_type].items() <= to_hf(config).items()


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        # transformers lets such a model see no later token.
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("albert", {"num_memory_blocks": 2}),
        ("marian", {"normalize_before": True}),
    ],
)
def test_what_would_change_the_numbers_is_refused(model_type: str, said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(said))):
        from_hf(family_of(model_type).config, {"model_type": model_type, **said})
