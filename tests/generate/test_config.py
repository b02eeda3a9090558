import subprocess
import sys

import pytest

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 257),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", None),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", (-1,)),
        ("seed", -1),
        ("logprobs", -1),
    ],
)
def test_impossible_values_are_named_in_one_line(field, value):
    with pytest.raises(ConfigError, match=field) as caught:
        GenerationConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_single_stop_string_and_a_list_become_tuples():
    assert GenerationConfig(stop="\n").stop == ("\n",)
    assert GenerationConfig(stop=["a", "b"]).stop == ("a", "b")
    assert GenerationConfig(stop_token_ids=2).stop_token_ids == (2,)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 8]},
            {"temperature": 0.6, "top_p": 0.9, "stop_token_ids": (7, 8)},
        ),
        ({"eos_token_id": 2, "pad_token_id": 0}, {"temperature": 0.0, "stop_token_ids": (2,)}),
        ({"do_sample": True, "top_k": None, "num_beams": 1, "typical_p": 1.0}, {}),
        ({"do_sample": True, "stop_strings": "END", "top_k": 50}, {"stop": ("END",), "top_k": 50}),
    ],
)
def test_generation_config_json_is_read(raw, expected):
    assert GenerationConfig.from_hf(raw) == GenerationConfig(**expected)


def test_changes_win_over_the_file():
    config = GenerationConfig.from_hf({"do_sample": True, "top_k": 5}, top_k=2, max_new_tokens=3)
    assert (config.top_k, config.max_new_tokens, config.temperature) == (2, 3, 1.0)


def test_what_a_file_may_say_is_read():
    raw = {
        "do_sample": False,
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[5], [6, 7]],
        "sequence_bias": [[[5, 6], 2.0]],
        "forced_eos_token_id": [2, 3],
        "force_words_ids": [[[1, 2], [3]], [4, 5]],
        "exponential_decay_length_penalty": [5, 1.1],
        "suppress_tokens": [8],
        "typical_p": 0.9,
        "max_length": 20,
        "min_length": 3,
    }
    config = GenerationConfig.from_hf(raw, encoder_decoder=True)
    assert config.bad_words_ids == ((5,), (6, 7))
    assert config.sequence_bias == (((5, 6), 2.0),)
    assert config.force_words_ids == (((1, 2), (3,)), ((4, 5),))
    assert config.exponential_decay_length_penalty == (5, 1.1)
    assert (config.forced_eos_token_id, config.suppress_tokens) == (2, (8,))
    assert (config.max_new_tokens, config.min_new_tokens) == (19, 2)
    assert GenerationConfig.from_hf(raw).max_new_tokens == 256


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"mirostat": 3}, "mirostat"),
        ({"mirostat": 2, "top_p": 0.9}, "mirostat itself chooses"),
        ({"dry_base": 0.5}, "dry_base"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids"),
        ({"sequence_bias": [[[1], 2.0, 3]]}, "sequence_bias"),
        ({"exponential_decay_length_penalty": (1, -1)}, "exponential_decay"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar"),
        ({"num_return_sequences": 2000}, "more than 1024 texts of one prompt"),
        ({"regex": ""}, "regex"),
        ({"json_schema": [1]}, "json_schema"),
        ({"trie": [(1, 2)]}, "trie is a list"),
        ({"num_beams": 4}, "beams are not drawn"),
        ({"num_beams": 4, "num_beam_groups": 3, "temperature": 0}, "num_beam_groups=3"),
        ({"diversity_penalty": 0.5}, "diversity_penalty"),
        ({"force_words_ids": [[1]]}, "force_words_ids"),
        ({"force_words_ids": [[]], "num_beams": 2, "temperature": 0}, "entry without words"),
        (
            {"force_words_ids": [[1]], "num_beams": 2, "num_beam_groups": 2, "temperature": 0},
            "groups are not made to write words",
        ),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"best_of": 2, "num_return_sequences": 3}, "best_of=2"),
        ({"best_of": 2, "num_beams": 2, "temperature": 0}, "not for a search; leave it at None"),
        ({"logprobs": 1, "num_beams": 2, "temperature": 0}, "logprobs=1 is for texts"),
        (
            {"num_return_sequences": 2, "penalty_alpha": 0.5, "top_k": 4, "temperature": 0},
            "leave it at 1",
        ),
        ({"length_penalty": 400.0}, "length_penalty=400.0 must be from -16 to 16"),
        ({"logit_bias": {"x": 1.0}}, "must be token ids"),
        ({"ignore_eos": "no"}, "ignore_eos='no' must be true or false"),
        ({"skip_special_tokens": None}, "skip_special_tokens=None must be true or false"),
        ({"json_schema": {"enum": {1}}}, "what is not JSON"),
        ({"num_beams": 2, "num_return_sequences": 3, "temperature": 0}, "num_return_sequences=3"),
    ],
)
def test_settings_that_cannot_be_together_are_named_in_one_line(asked, said):
    with pytest.raises(ConfigError, match=said) as caught:
        GenerationConfig(**asked)
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_none_is_named():
    with pytest.raises(ConfigError, match="no generation setting 'temprature'"):
        GenerationConfig.from_hf({}, temprature=1.0)


@pytest.mark.parametrize(
    "raw", [{"encoder_no_repeat_ngram_size": 3}, {"dola_layers": "low"}, {"top_h": 0.4}]
)
def test_settings_that_would_change_the_text_are_refused(raw):
    with pytest.raises(ConfigError, match=next(iter(raw))):
        GenerationConfig.from_hf(raw)


def test_temperatures_near_zero_are_greedy():
    assert GenerationConfig(temperature=0).greedy
    assert GenerationConfig(temperature=1e-30).greedy
    assert not GenerationConfig(temperature=0.01).greedy


def test_the_config_needs_no_torch():
    code = "import sys, polyhead.generate.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
