"""The seven roles a special token can play, and the parts a tokenizer is put together from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import tokenizers

from polyhead.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Which token plays which role; None where a vocabulary has none."""

    pad: str | None = None
    unk: str | None = None
    bos: str | None = None
    eos: str | None = None
    mask: str | None = None
    cls: str | None = None
    sep: str | None = None

    def items(self) -> Iterator[tuple[str, str]]:
        """The roles that are played, with their tokens."""
        for role in ROLES:
            token = getattr(self, role)
            if token is not None:
                yield role, token

    def updated(self, changes: Mapping[str, str | None] | None) -> Self:
        """These roles with some changed; None takes a role away. An unknown role: ConfigError."""
        for role, token in (changes or {}).items():
            if role not in ROLES:
                raise ConfigError(
                    f"unknown special token role {role!r}; the roles are {', '.join(ROLES)}"
                )
            if token is not None and not (isinstance(token, str) and token):
                raise ConfigError(
                    f"the {role} token is {token!r}; give a string that is not empty, or None"
                )
        return replace(self, **(changes or {}))

    def distinct(self) -> list[str]:
        """Every token once, in the order of the roles."""
        return list(dict.fromkeys(token for _, token in self.items()))


ROLES = tuple(f.name for f in fields(SpecialTokens))


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """What every reader and recipe hands to `Tokenizer`.

    `stops` are ids that end generation besides the eos token; `config` keeps the entries of
    `tokenizer_config.json` that are written back untouched. `target` cuts texts that a model is to
    write, of the same ids, where it is another than for those it reads.
    """

    backend: tokenizers.Tokenizer
    special: SpecialTokens
    stops: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    clean_up: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    target: tokenizers.Tokenizer | None = None


def add_special(backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Make `tokens` special, in one call (each call rebuilds the matcher); new ones get new ids."""
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, normalized=False, special=True) for t in tokens]
    )


def frame(
    backend: tokenizers.Tokenizer, before: str | None = None, after: str | None = None
) -> None:
    """Put the token `before` in front of every text and `after` behind it; type ids 0 and 1."""
    if before is None and after is None:
        return
    single = [t for t in (before, "$A:0", after) if t is not None]
    second = [t for t in (before, "$B:1", after) if t is not None]
    _template(backend, single, single + [t if t == "$B:1" else f"{t}:1" for t in second])


def frame_bert(backend: tokenizers.Tokenizer, cls: str, sep: str) -> None:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP] with type ids 0 and 1."""
    single = [cls, "$A:0", sep]
    _template(backend, single, [*single, "$B:1", f"{sep}:1"])


def _template(backend: tokenizers.Tokenizer, single: list[str], pair: list[str]) -> None:
    names = {t.removesuffix(":1") for t in pair if not t.startswith("$")}
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, backend.token_to_id(name)) for name in sorted(names)],
    )
