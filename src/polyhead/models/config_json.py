"""`config.json`, read into a config and written from one.

A key that could change the numbers and that nothing reads is refused; the rest is kept and
written back.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Any, TypeVar

from polyhead.errors import ConfigError
from polyhead.models.config import JSON, Config, Row

HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels
    architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size custom_pipelines decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    eos_token_ids exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id initializer_factor is_decoder is_encoder_decoder is_llama_config label2id
    language length_penalty license max_length max_sequence_length min_length model_type name
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_past output_router_logits output_scores
    pad_token_id prefix pretraining_tp pruned_heads remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate router_jitter_noise sbert_ce_default_activation_function
    sentence_transformers sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    xla_device
    """.split()
)
"""Keys that say nothing about the numbers of a forward."""

C = TypeVar("C", bound=Config)


def from_hf(cls: type[C], data: JSON) -> C:
    """Read a `config.json`; raises ConfigError for what is missing or what nothing would read."""
    row = cls.row(data["model_type"])
    values = dict(row.implied)
    read: set[str] = set()
    for item in _mapped(cls):
        if item.name in row.implied:
            continue
        keys = _keys(item, row)
        read.update(key.split(".")[0] for key in keys)
        key, value = _look_up(data, row.absent, keys)
        if key is not None:
            values[item.name] = _read(item, key, value)
        elif item.default is MISSING:
            raise ConfigError(f"config.json has no {keys[0]!r}; it is needed")
    fixed = {key for key, value in row.fixed.items() if data.get(key) == value}
    harmless = (row.harmless | HARMLESS) - row.fixed.keys()
    _refuse_unread(data, read | fixed | harmless)
    return cls(model_type=row.model_type, source=dict(data), **values)


def _read(item: Field[Any], key: str, value: Any) -> Any:
    if value is None and item.type is bool:
        return False
    try:
        return item.metadata["read"](value)
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError):
        raise ConfigError(f"config.json has {key!r}: {value!r}, of no form known here") from None


def to_hf(config: Config) -> dict[str, Any]:
    """The `config.json` of a config: what was read comes back as it was, the rest is written."""
    row = config.row(config.model_type)
    first = next(iter(row.heads), "none")
    data: dict[str, Any] = {"model_type": row.model_type}
    data["architectures"] = [row.architecture(first)]
    data.update(config.source)
    for item in _mapped(type(config)):
        if item.name in row.implied:
            continue
        value = getattr(config, item.name)
        key, found = _look_up(config.source, row.absent, _keys(item, row))
        fresh = row.keys.get(item.metadata["fresh"], item.metadata["fresh"])
        implicit = item.default if key is None else item.metadata["read"](found)
        if value != implicit:
            written = None if value is None else item.metadata["write"](value)
            _put(data, key or fresh, written)
        elif not config.source and value is not None:
            _put(data, key or fresh, item.metadata["write"](value))
    if config.labels and data.get("id2label") != config.source.get("id2label"):
        data["label2id"] = {name: number for number, name in enumerate(config.labels)}
    return data


def complete_hf(config: Config) -> dict[str, Any]:
    """`to_hf` with every field under its first key, for writers that know no defaults."""
    row = config.row(config.model_type)
    read = {key.split(".")[0] for item in _mapped(type(config)) for key in _keys(item, row)}
    kept = {key: value for key, value in config.source.items() if key not in read}
    return {**to_hf(replace(config, source={})), **kept}


def _mapped(cls: type[Config]) -> list[Field[Any]]:
    return [item for item in fields(cls) if "keys" in item.metadata]


def _keys(item: Field[Any], row: Row) -> tuple[str, ...]:
    return tuple(row.keys.get(key, key) for key in item.metadata["keys"])


def _look_up(data: JSON, absent: JSON, keys: tuple[str, ...]) -> tuple[str | None, Any]:
    """The field's first key that says something in the file, or for its type, and its value.

    A key that is null or empty speaks only where none of the field's others does.
    """
    for source in (data, absent):
        said = [(key, *_inside(source, key)) for key in keys]
        present = [(key, value) for key, there, value in said if there]
        telling = [(key, value) for key, value in present if value is not None and value != {}]
        if present:
            return (telling or present)[0]
    return None, None


def _inside(data: JSON, key: str) -> tuple[bool, Any]:
    """Whether a dotted key is there, and its value."""
    here: Any = data
    for part in key.split("."):
        if not isinstance(here, Mapping) or part not in here:
            return False, None
        here = here[part]
    return True, here


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        inner = data.get(part)
        data[part] = dict(inner) if isinstance(inner, Mapping) else {}
        data = data[part]
    data[last] = value


def _refuse_unread(data: JSON, read: frozenset[str] | set[str]) -> None:
    for key, value in data.items():
        # What is switched off, or left to a default, changes nothing.
        if key not in read and value is not None and value is not False:
            raise ConfigError(
                f"config.json has {key!r}: {value!r}, which Polyhead does not read and which may "
                "change the numbers; remove it if you know that it does not"
            )
