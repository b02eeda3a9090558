"""How to write the answer to a source text: greedy, drawn, or by beams."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class SearchConfig(GenerationConfig):
    """`GenerationConfig` and what translators add to it, named as in `generation_config.json`."""

    temperature: float = 0.0
    """Logits are divided by it. 0 is greedy, or, with several beams, beam search."""
    num_beams: int = 1
    """Keep this many unfinished answers of a text; 1 is greedy, or drawn."""
    length_penalty: float = 1.0
    """An answer scores its log-probability / tokens ** this: above 0 favours long ones."""
    early_stopping: bool | str = False
    """With as many finished answers as beams: True stops; False stops unless the best unfinished
    one would beat the worst of them at its present length; "never" at any length."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice. 0: they may."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that are never written."""
    forced_bos_token_id: int | None = None
    """The first token of every answer."""
    forced_eos_token_id: int | None = None
    """The last token of an answer that reaches `max_new_tokens`."""
    decoder_start_token_id: int | None = None
    """What the decoder reads first; None: what the model or its tokenizer begins with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_beams", "no_repeat_ngram_size"):
            least = 1 if name == "num_beams" else 0
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.early_stopping not in (True, False, "never"):
            raise ConfigError(
                f'early_stopping={self.early_stopping!r} must be true, false or "never"'
            )
        if self.num_beams > 1 and not self.greedy:
            raise ConfigError(
                f"num_beams={self.num_beams} with temperature={self.temperature}: beams are not "
                "drawn; use temperature=0, or num_beams=1"
            )
        words = tuple(tuple(word) for word in self.bad_words_ids)
        object.__setattr__(self, "bad_words_ids", words)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], **changes: Any) -> Self:
        """From a `generation_config.json`, or a `config.json` of the time before there was one.

        `changes` win. `max_length` and `min_length` count the token that the decoder begins with.
        A setting that would change the text and that nothing here does raises ConfigError.
        """
        known = {field.name for field in fields(cls)}
        said = {name: value for name, value in raw.items() if value is not None}
        if isinstance(forced := said.get("forced_eos_token_id"), list):
            said["forced_eos_token_id"] = forced[0]
        for old, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if old in said:
                said.setdefault(new, max(said[old] - 1, 0))
        if "max_new_tokens" in changes:
            # A shorter answer than the file has in mind is not made impossible by its least length.
            least = min(said.get("min_new_tokens", 0), changes["max_new_tokens"])
            changes.setdefault("min_new_tokens", least)
        return super().from_hf(said, **{name: v for name, v in changes.items() if name in known})
