"""What the values of a `GenerationConfig` may be, and the one form they are kept in."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from polyhead.errors import ConfigError

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # name in generation_config.json: values that change nothing, besides null
    "top_h": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "constraints": ([],),
    "forced_decoder_ids": ([],),
    "watermarking_config": (),
    "dola_layers": (),
}

_WHOLE = {
    # name: the least, and whether None is allowed too
    "max_new_tokens": (1, False),
    "min_new_tokens": (0, False),
    "top_k": (0, False),
    "dry_allowed_length": (1, False),
    "dry_penalty_last_n": (-1, False),
    "no_repeat_ngram_size": (0, False),
    "forced_bos_token_id": (0, True),
    "forced_eos_token_id": (0, True),
    "num_beams": (1, False),
    "num_beam_groups": (1, False),
    "decoder_start_token_id": (0, True),
    "num_return_sequences": (1, False),
    "best_of": (1, True),
    "seed": (0, True),
    "logprobs": (0, True),
}

_INF = math.inf
_MOST_TEXTS = 1024  # that one prompt is asked for: each has a row of its own
_NUMBERS: dict[str, tuple[float, float, str]] = {
    # name: from, to, and what to say
    "temperature": (0, _INF, "0 for greedy, or a number above it"),
    "top_p": (0, 1, "above 0, up to 1"),
    "min_p": (0, 1, "from 0 to 1"),
    "typical_p": (0, 1, "above 0, up to 1"),
    "epsilon_cutoff": (0, 1, "from 0 to 1"),
    "eta_cutoff": (0, 1, "from 0 to 1"),
    "mirostat_tau": (0, _INF, "0 or more bits"),
    "mirostat_eta": (0, 1, "from 0 to 1"),
    "repetition_penalty": (0, _INF, "above 0; 1 is none"),
    "presence_penalty": (-_INF, _INF, "a finite number"),
    "frequency_penalty": (-_INF, _INF, "a finite number"),
    "dry_multiplier": (0, _INF, "0 for none, or a number above it"),
    "dry_base": (1, _INF, "1 or more"),
    "guidance_scale": (-_INF, _INF, "a finite number; 1 is none"),
    # A length to a higher power may be no number any more.
    "length_penalty": (-16, 16, "from -16 to 16"),
    "diversity_penalty": (0, _INF, "0 or more"),
    "penalty_alpha": (0, 1, "from 0 to 1"),
}

_IDS = (
    "stop_token_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_prefix_ids",
    "negative_prompt_ids",
)


def normalized(config: Any) -> dict[str, Any]:
    """The fields of other forms (lists, mappings, single values) in the form they are kept in."""
    values: dict[str, Any] = {name: _ids(name, getattr(config, name)) for name in _IDS}
    values["stop"] = _strings("stop", config.stop)
    values["dry_sequence_breakers"] = _strings(
        "dry_sequence_breakers", config.dry_sequence_breakers
    )
    values["bad_words_ids"] = _words("bad_words_ids", config.bad_words_ids)
    # A word alone, as in transformers, is one without alternatives.
    values["force_words_ids"] = tuple(
        _words("force_words_ids", [entry] if _flat(entry) else entry)
        for entry in _items("force_words_ids", config.force_words_ids)
    )
    if not all(values["force_words_ids"]):
        raise ConfigError("force_words_ids has an entry without words; remove it")
    values["logit_bias"] = tuple(
        (_ids("logit_bias", [_as_int(token)])[0], _bias("logit_bias", bias))
        for token, bias in _pairs("logit_bias", config.logit_bias)
    )
    values["sequence_bias"] = tuple(
        (_words("sequence_bias", [ids])[0], _bias("sequence_bias", bias))
        for ids, bias in _pairs("sequence_bias", config.sequence_bias)
    )
    if (decay := config.exponential_decay_length_penalty) is not None:
        values["exponential_decay_length_penalty"] = _decay(decay)
    if isinstance(config.json_schema, Mapping | bool):
        values["json_schema"] = _json(config.json_schema)
    return values


def check(config: Any) -> None:
    """ConfigError, of one line, for the first value that cannot be."""
    for name, (least, optional) in _WHOLE.items():
        value = getattr(config, name)
        if not (optional and value is None) and not (_is_whole(value) and value >= least):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
    for name, (low, high, allowed) in _NUMBERS.items():
        if not _is_number(value := getattr(config, name)) or not low <= value <= high:
            raise ConfigError(f"{name}={value!r} must be {allowed}")
    for name in ("top_p", "typical_p"):
        if getattr(config, name) == 0:
            raise ConfigError(f"{name}=0.0 leaves no token; for greedy use temperature=0")
    if config.repetition_penalty == 0:
        raise ConfigError("repetition_penalty=0.0 divides by zero; 1 is no penalty")
    if config.min_new_tokens > config.max_new_tokens:
        raise ConfigError(
            f"min_new_tokens={config.min_new_tokens} is more than "
            f"max_new_tokens={config.max_new_tokens}; lower the one or raise the other"
        )
    for name in ("ignore_eos", "skip_special_tokens"):
        if not isinstance(value := getattr(config, name), bool):
            raise ConfigError(f"{name}={value!r} must be true or false")
    if config.early_stopping not in (True, False, "never"):
        raise ConfigError(
            f'early_stopping={config.early_stopping!r} must be true, false or "never"'
        )
    _check_together(config)


def _check_together(config: Any) -> None:
    _check_mirostat(config)
    _check_search(config)
    _check_guidance(config)
    forms = ("json_schema", "regex", "grammar", "trie")
    asked = [name for name in forms if getattr(config, name) is not None]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are given; a text can follow only one of them")
    for name in asked:
        value = getattr(config, name)
        if name == "trie":
            if not hasattr(value, "allowed"):
                raise ConfigError(f"trie is a {type(value).__name__}; give a Trie")
        elif not isinstance(value, str) or not value:
            raise ConfigError(f"{name}={value!r} must be a text that is not empty")
    for name in ("num_beams", "num_return_sequences", "best_of"):
        if (getattr(config, name) or 0) > _MOST_TEXTS:
            raise ConfigError(
                f"{name}={getattr(config, name)} is more than {_MOST_TEXTS} texts of one prompt; "
                "ask several times, with seeds of their own"
            )
    if config.best_of is not None and config.best_of < config.num_return_sequences:
        raise ConfigError(
            f"best_of={config.best_of} is less than num_return_sequences="
            f"{config.num_return_sequences}; write at least as many as are returned"
        )


def _check_mirostat(config: Any) -> None:
    if isinstance(config.mirostat, bool) or config.mirostat not in (0, 1, 2):
        raise ConfigError(f"mirostat={config.mirostat!r} must be 0, 1 or 2")
    filters = {"top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1} | dict.fromkeys(
        ("epsilon_cutoff", "eta_cutoff"), 0
    )
    for name, neutral in filters.items():
        if config.mirostat and getattr(config, name) != neutral:
            raise ConfigError(
                f"mirostat={config.mirostat} with {name}={getattr(config, name)!r}: mirostat "
                f"itself chooses how many tokens stay; leave {name} at {neutral}"
            )


def _check_guidance(config: Any) -> None:
    negative = [
        name for name in ("negative_prompt", "negative_prompt_ids") if getattr(config, name)
    ]
    if not isinstance(config.negative_prompt, str):
        raise ConfigError(f"negative_prompt={config.negative_prompt!r} must be a text")
    if len(negative) > 1:
        raise ConfigError("negative_prompt and negative_prompt_ids are given; give one of them")
    if config.guidance_scale == 1 and negative:
        raise ConfigError(f"{negative[0]} does nothing at guidance_scale=1; give another scale")
    if config.guidance_scale != 1 and (config.num_beams > 1 or config.penalty_alpha):
        raise ConfigError(
            f"guidance_scale={config.guidance_scale} is for texts that are greedy or drawn; leave "
            "num_beams at 1 and penalty_alpha at 0"
        )


def _check_search(config: Any) -> None:
    greedy, beams = config.greedy, config.num_beams
    if beams > 1 and not greedy:
        raise ConfigError(
            f"num_beams={beams} with temperature={config.temperature}: beams are not "
            "drawn; use temperature=0, or num_beams=1"
        )
    if beams % config.num_beam_groups:
        raise ConfigError(
            f"num_beams={beams} cannot be divided into num_beam_groups={config.num_beam_groups}"
        )
    if config.diversity_penalty and config.num_beam_groups == 1:
        raise ConfigError("diversity_penalty needs groups of beams; give num_beam_groups")
    if config.force_words_ids and beams == 1:
        raise ConfigError("force_words_ids needs beam search; give num_beams of 2 or more")
    if config.force_words_ids and config.num_beam_groups > 1:
        raise ConfigError(
            f"force_words_ids with num_beam_groups={config.num_beam_groups}: groups are not made "
            "to write words; leave num_beam_groups at 1"
        )
    if config.penalty_alpha and (not greedy or config.top_k < 2 or beams > 1):
        raise ConfigError(
            f"penalty_alpha={config.penalty_alpha} is contrastive search; give a top_k of 2 or "
            "more, temperature=0 and no beams"
        )
    for name, neutral in (("best_of", None), ("logprobs", None), ("num_return_sequences", 1)):
        # Beams return several, but draw none.
        is_fine = getattr(config, name) == neutral or (beams > 1 and neutral == 1)
        if (beams > 1 or config.penalty_alpha) and not is_fine:
            raise ConfigError(
                f"{name}={getattr(config, name)} is for texts that are drawn, not for a search; "
                f"leave it at {neutral}"
            )
    if beams > 1 and config.num_return_sequences > beams:
        raise ConfigError(
            f"num_return_sequences={config.num_return_sequences} is more than num_beams={beams}; "
            "a search returns no more than it keeps"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and _is_whole(value[0])


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name}={value!r} must be a list")
    return tuple(value)


def _pairs(name: str, value: Any) -> list[tuple[Any, Any]]:
    pairs = list(value.items()) if isinstance(value, Mapping) else list(_items(name, value))
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"{name}={value!r} must be a mapping, or pairs")
    return pairs


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _items(name, value)
    if not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(f"{name}={value!r} must be strings, none of them empty")
    return strings


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else _items(name, value)
    if not all(_is_whole(i) and i >= 0 for i in ids):
        raise ConfigError(f"{name}={value!r} must be token ids, 0 or more")
    return ids


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(name, word) for word in _items(name, value))
    if not all(words):
        raise ConfigError(f"{name}={value!r} has a word without tokens; remove it")
    return words


def _as_int(token: Any) -> Any:
    """A token id that JSON has made the key of an object."""
    return int(token) if isinstance(token, str) and token.isdecimal() else token


def _bias(name: str, value: Any) -> float:
    if value != -math.inf and not _is_number(value):
        raise ConfigError(f"{name} has a bias of {value!r}; it must be a number, or -inf")
    return float(value)


def _json(schema: Any) -> str:
    try:
        return json.dumps(schema)
    except RecursionError:
        raise ConfigError("json_schema is nested too deep; make it flatter") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema holds what is not JSON: {error}") from None


def _decay(value: Any) -> tuple[int, float]:
    pair = value if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not (_is_whole(pair[0]) and _is_number(pair[1])) or pair[1] <= 0:
        raise ConfigError(
            f"exponential_decay_length_penalty={value!r} must be (start, factor), factor above 0"
        )
    return pair[0], float(pair[1])
