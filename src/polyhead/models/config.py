"""Configurations: frozen values with the papers' names.

Each field says where it stands in a Hugging Face `config.json`; models/config_json.py reads and
writes the file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.models.fits import fits, in_words
from polyhead.models.row import JSON, Row

__all__ = ["JSON", "Config", "Row", "head_width", "hf"]

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


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


def _read_labels(value: Any) -> tuple[str, ...] | None:
    if value is None or value == {}:
        return None
    if isinstance(value, int):
        return tuple(f"LABEL_{number}" for number in range(value))
    numbered = {int(number): str(name) for number, name in value.items()}
    if sorted(numbered) != list(range(len(numbered))):
        raise ConfigError(f"id2label numbers its labels {sorted(numbered)}; number them from 0")
    return tuple(numbered[number] for number in range(len(numbered)))


def _write_labels(labels: tuple[str, ...]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(labels)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all families' configurations share.

    labels:  names of a classifier's classes. problem: what they are, of `PROBLEMS`; None where it
             follows from the data.
    tasks:   several heads at once: `{name: {"head": ..., "labels": [...], "problem": ...}}`.
    ranks:   of linear layers that are two narrow ones, by their names in the backbone.
    """

    model_type: str = ""
    labels: tuple[str, ...] | None = hf(
        "id2label", "num_labels", default=None, read=_read_labels, write=_write_labels
    )
    problem: str | None = hf("problem_type", default=None)
    tasks: Mapping[str, Any] | None = hf("polyhead_tasks", default=None)
    ranks: Mapping[str, int] | None = hf("polyhead_ranks", default=None)
    source: JSON = field(default_factory=dict[str, Any], repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not fits(value, item.type):
                raise ConfigError(f"{item.name} is {value!r}; it must be {in_words(item.type)}")
            most = _SIZES.get(item.name)
            least = 0 if item.name in ("num_experts", "type_vocab_size") else 1
            if most is not None and isinstance(value, int) and not least <= value <= most:
                raise ConfigError(f"{item.name} is {value}; it must be from {least} to {most}")
            if item.name in ("norm_eps", "init_std") and value < 0:
                raise ConfigError(f"{item.name} is {value}; it must not be below 0")
            if item.name.endswith("dropout") and not 0 <= (value or 0) < 1:
                raise ConfigError(f"{item.name} is {value}; it must be from 0 to below 1")
        if self.labels is not None and not self.labels:
            raise ConfigError("labels is empty; name one class or more")
        if self.problem not in (None, *PROBLEMS):
            raise ConfigError(f"problem is {self.problem!r}; choose {', '.join(PROBLEMS)}")

    @property
    def num_labels(self) -> int:
        """Classes of a classifier; two where no labels are named."""
        return 2 if self.labels is None else len(self.labels)

    @property
    def max_tokens(self) -> int | None:
        """Tokens that a text may have; None where nothing bounds them."""
        return getattr(self, "max_seq_len", None)

    def as_stored(self, names: Collection[str]) -> Self:
        """The same with what only the names of a checkpoint's tensors tell."""
        return self

    def untied(self) -> Self:
        """The same with a language head of its own."""
        return replace(self, tie_embeddings=False)

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


def head_width(d_model: int, num_heads: int, head_dim: int | None) -> int:
    """The width of a head: an equal share of `d_model`, unless `head_dim` names it."""
    if head_dim is not None:
        return head_dim
    if d_model % num_heads:
        raise ConfigError(f"d_model {d_model} does not divide into {num_heads} heads")
    return d_model // num_heads


# What a file that lies could ask for would otherwise be built before its tensors are looked at.
_SIZES = {
    **dict.fromkeys("vocab_size d_model d_ff num_heads num_kv_heads head_dim".split(), 2**24),
    **dict.fromkeys(("type_vocab_size", "embedding_width"), 2**24),
    **dict.fromkeys(("num_layers", "num_experts", "top_k", "sparse_step"), 4096),
    **dict.fromkeys(("max_seq_len", "window"), 2**31),
}
