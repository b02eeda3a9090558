"""How to generate: plain fields, the same from Python, the command line and a server."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from polyhead.errors import ConfigError

_NEARLY_GREEDY = 1e-5


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Fields are named as in transformers' `generation_config.json`.

    Applied in this order: penalties, minimum length, temperature, top-k, top-p, min-p. What is
    left is drawn from. A value that cannot be raises ConfigError.
    """

    max_new_tokens: int = 256
    """Stop after this many tokens. A full context of the model stops earlier."""
    min_new_tokens: int = 0
    """Neither a stop token nor a stop string ends the text before this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it. 0 is greedy: the most likely token, nothing drawn."""
    top_k: int = 0
    """Draw from the k most likely tokens; ties with the k-th stay. 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities reach p together. 1: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this times as likely as the most likely. 0: from all."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and the text so far: positive logits are divided by it, negative ones
    multiplied. 1: none."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the text so far (not the prompt) contains."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as often as the text so far (not the prompt) contains it."""
    stop: tuple[str, ...] = ()
    """End before the first of these strings to be complete; none of it is part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    """End at any of these tokens too, besides the tokenizer's own end tokens."""
    ignore_eos: bool = False
    """Go on past the tokenizer's end tokens."""
    seed: int | None = None
    """The same seed and prompt draw the same tokens, whatever else is in the batch. None: anew."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many most likely ones; None: not wanted.
    They are the model's own, before penalties, temperature and filters."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids(self.stop_token_ids))
        _whole(self, "max_new_tokens", 1)
        _whole(self, "min_new_tokens", 0)
        _whole(self, "top_k", 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}; lower the one or raise the other"
            )
        _number(self, "temperature", 0, math.inf, "0 for greedy, or a number above it")
        _number(self, "top_p", 0, 1, "above 0, up to 1")
        if self.top_p == 0:
            raise ConfigError("top_p=0.0 leaves no token; for greedy use temperature=0")
        _number(self, "min_p", 0, 1, "from 0 to 1")
        _number(self, "repetition_penalty", 0, math.inf, "above 0; 1 is none")
        if self.repetition_penalty == 0:
            raise ConfigError("repetition_penalty=0.0 divides by zero; 1 is no penalty")
        _number(self, "presence_penalty", -math.inf, math.inf, "a finite number")
        _number(self, "frequency_penalty", -math.inf, math.inf, "a finite number")
        if self.seed is not None:
            _whole(self, "seed", 0)
        if self.logprobs is not None:
            _whole(self, "logprobs", 0)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken; so too at temperatures where nothing else is."""
        return self.temperature < _NEARLY_GREEDY

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], **changes: Any) -> Self:
        """From a `generation_config.json`; `changes` win over it.

        `do_sample` false or absent is temperature 0, as there. `max_length`, which counts the
        prompt, is not read, and without a `top_k` all tokens may be drawn (there: 50). A setting
        that would change the text and that nothing here does (beams, n-gram bans, ...) raises
        ConfigError.
        """
        known = {field.name for field in fields(cls)}
        for name, harmless in _UNSUPPORTED.items():
            if name not in known and raw.get(name) not in (None, *harmless):
                raise ConfigError(
                    f"generation setting {name}={raw[name]!r} is not supported; remove it"
                )
        values = {name: raw[name] for name in known & raw.keys() if raw[name] is not None}
        if raw.get("stop_strings"):
            values["stop"] = raw["stop_strings"]
        if raw.get("eos_token_id") is not None:
            values["stop_token_ids"] = raw["eos_token_id"]
        if not raw.get("do_sample"):
            values["temperature"] = 0.0
        return cls(**(values | changes))


_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # name in generation_config.json: values that change nothing, besides null
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
}


def _whole(config: GenerationConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")


def _number(config: GenerationConfig, name: str, low: float, high: float, allowed: str) -> None:
    value = getattr(config, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be {allowed}")


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(s, str) and s for s in strings):
        raise ConfigError(f"stop={value!r} must be strings, none of them empty")
    return strings


def _ids(value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"stop_token_ids={value!r} must be token ids, 0 or more")
    return ids
