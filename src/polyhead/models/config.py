"""Configurations: frozen values with the papers' names, read from and written to `config.json`.

Each field says where it stands in a Hugging Face `config.json`. A key that could change the
numbers and that nothing reads is refused; the rest is kept and written back.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from polyhead.errors import ConfigError
from polyhead.models.fits import fits, in_words

JSON = Mapping[str, Any]

HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size custom_pipelines decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label initializer_factor is_decoder is_encoder_decoder is_llama_config label2id
    length_penalty license max_length max_sequence_length min_length model_type
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate router_jitter_noise sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache unk_token_id pretraining_tp
    """.split()
)
"""Keys that say nothing about the numbers of a forward."""


def hf(
    *keys: str,
    default: Any = MISSING,
    fresh: str | None = None,
    read: Callable[[Any], Any] = lambda value: value,
    write: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """A field that stands under the first of `keys` present in `config.json`; dots go inside.

    A fresh config is written under `fresh`, or the first. `read` and `write` translate the value.
    """
    said = {"keys": keys, "fresh": fresh or keys[0], "read": read, "write": write}
    return field(default=default, metadata=said)


@dataclass(frozen=True)
class Row:
    """What a `model_type` says beyond its family's config.

    absent:   values of `config.json` keys that the file leaves out.
    implied:  fields that the type fixes and `config.json` does not say.
    harmless: further keys that change nothing.
    """

    model_type: str
    architecture: str
    absent: JSON = field(default_factory=dict[str, Any])
    implied: JSON = field(default_factory=dict[str, Any])
    harmless: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all families' configurations share."""

    model_type: str = ""
    source: JSON = field(default_factory=dict[str, Any], repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not fits(value, item.type):
                raise ConfigError(f"{item.name} is {value!r}; it must be {in_words(item.type)}")
            most = _SIZES.get(item.name)
            least = 0 if item.name == "num_experts" else 1
            if most is not None and isinstance(value, int) and not least <= value <= most:
                raise ConfigError(f"{item.name} is {value}; it must be from {least} to {most}")
            if item.name in ("norm_eps", "init_std") and value < 0:
                raise ConfigError(f"{item.name} is {value}; it must not be below 0")
            if item.name.endswith("dropout") and not 0 <= value < 1:
                raise ConfigError(f"{item.name} is {value}; it must be from 0 to below 1")

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        """The model types of this family."""
        raise NotImplementedError

    @classmethod
    def row(cls, model_type: str) -> Row:
        """The row of one model type."""
        return next(row for row in cls.rows() if row.model_type == model_type)

    @classmethod
    def fresh(cls, model_type: str, **values: Any) -> Self:
        """A config of this type from field values; unknown fields and impossible ones raise."""
        row = cls.row(model_type)
        known = {item.name for item in fields(cls)} - {"source", "model_type"}
        for name in values.keys() - known:
            raise ConfigError(
                f"{model_type} has no field {name!r}; it has {', '.join(sorted(known))}"
            )
        for name, value in row.implied.items():
            if values.setdefault(name, value) != value:
                raise ConfigError(f"{name} is {value!r} in {model_type}, not {values[name]!r}")
        missing = [
            item.name
            for item in fields(cls)
            if item.default is MISSING and item.name in known and item.name not in values
        ]
        if missing:
            raise ConfigError(f"{model_type} needs a value for {', '.join(missing)}")
        return cls(model_type=model_type, **values)


# What a file that lies could ask for would otherwise be built before its tensors are looked at.
_SIZES = {
    **dict.fromkeys("vocab_size d_model d_ff num_heads num_kv_heads head_dim".split(), 2**24),
    **dict.fromkeys(("num_layers", "num_experts", "top_k", "sparse_step"), 4096),
    **dict.fromkeys(("max_seq_len", "window"), 2**31),
}

C = TypeVar("C", bound=Config)


def from_hf(cls: type[C], data: JSON) -> C:
    """Read a `config.json`; raises ConfigError for what is missing or what nothing would read."""
    row = cls.row(data["model_type"])
    values = dict(row.implied)
    read: set[str] = set()
    for item in _mapped(cls):
        if item.name in row.implied:
            continue
        read.update(key.split(".")[0] for key in item.metadata["keys"])
        key, value = _look_up(data, row.absent, item)
        if key is not None:
            values[item.name] = _read(item, key, value)
        elif item.default is MISSING:
            raise ConfigError(f"config.json has no {item.metadata['keys'][0]!r}; it is needed")
    _refuse_unread(data, read | row.harmless | HARMLESS)
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
    data: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.architecture]}
    data.update(config.source)
    for item in _mapped(type(config)):
        if item.name in row.implied:
            continue
        value = getattr(config, item.name)
        key, found = _look_up(config.source, row.absent, item)
        implicit = item.default if key is None else item.metadata["read"](found)
        if value != implicit:
            written = None if value is None else item.metadata["write"](value)
            _put(data, key or item.metadata["fresh"], written)
        elif not config.source and value is not None:
            _put(data, key or item.metadata["fresh"], item.metadata["write"](value))
    return data


def complete_hf(config: Config) -> dict[str, Any]:
    """`to_hf` with every field under its first key, for writers that know no defaults."""
    read = {key.split(".")[0] for item in _mapped(type(config)) for key in item.metadata["keys"]}
    kept = {key: value for key, value in config.source.items() if key not in read}
    return {**to_hf(replace(config, source={})), **kept}


def _mapped(cls: type[Config]) -> list[Field[Any]]:
    return [item for item in fields(cls) if "keys" in item.metadata]


def _look_up(data: JSON, absent: JSON, item: Field[Any]) -> tuple[str | None, Any]:
    """The field's first key that says something in the file, or for its type, and its value.

    A key that is null or empty speaks only where none of the field's others does.
    """
    for source in (data, absent):
        said = [(key, *_inside(source, key)) for key in item.metadata["keys"]]
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
