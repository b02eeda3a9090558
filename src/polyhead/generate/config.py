"""How to generate: plain fields, the same from Python, the command line and a server."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from polyhead.errors import ConfigError
from polyhead.generate.config_rules import UNSUPPORTED, check, normalized

_NEARLY_GREEDY = 1e-5


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Fields are named as in transformers' `generation_config.json`, or as llama.cpp names them.

    Applied in this order: guidance, biases, penalties, bans, what a trie or a grammar allows,
    forced tokens; then temperature, top-k, top-p, min-p, typical, epsilon, eta. What is left is
    drawn from. A value that cannot be raises ConfigError.
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
    typical_p: float = 1.0
    """Draw from the fewest tokens, those first whose surprise is nearest to the expected one, that
    reach probability p together (Meister et al. 2022). 1: from all."""
    epsilon_cutoff: float = 0.0
    """Draw from tokens at least this likely (Hewitt et al. 2022). 0: from all."""
    eta_cutoff: float = 0.0
    """As epsilon_cutoff, but lower where the model is unsure: min(eta, sqrt(eta) exp(-entropy))."""
    mirostat: int = 0
    """2 or 1: keep the text's surprise at `mirostat_tau` (Basu et al. 2020, version 2 or 1), in
    place of the filters above. 0: off."""
    mirostat_tau: float = 5.0
    """The surprise that mirostat aims at, in bits a token."""
    mirostat_eta: float = 0.1
    """How fast mirostat follows: the share of each token's error that it takes back."""

    repetition_penalty: float = 1.0
    """Tokens of the prompt and the text so far: positive logits are divided by it, negative ones
    multiplied. 1: none."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the text so far (not the prompt) contains."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as often as the text so far (not the prompt) contains it."""
    dry_multiplier: float = 0.0
    """"Don't repeat yourself": a token that would make a run of n tokens of prompt and text come
    again loses multiplier × base ** (n - allowed length). 0: none."""
    dry_base: float = 1.75
    """How the loss grows with each token of the run; at least 1."""
    dry_allowed_length: int = 2
    """Runs shorter than this many tokens may come again."""
    dry_penalty_last_n: int = -1
    """Look for runs in this many last tokens of prompt and text. -1: in all."""
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """No run goes over a token that holds one of these strings."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): after `start` tokens, end tokens gain |logit| × (factor ** further - 1)."""

    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice. 0: they may."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that are never written."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never written."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that the text never begins with."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs (or a mapping) of a token and what is added to its logit; -100 is as good as never."""
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    """Pairs of a run of tokens and what is added to the logit of the last where it follows the
    others."""

    forced_bos_token_id: int | None = None
    """The first token of every text."""
    forced_prefix_ids: tuple[int, ...] = ()
    """The first tokens of every text, after a `forced_bos_token_id`."""
    forced_eos_token_id: int | None = None
    """The last token of a text that reaches `max_new_tokens`."""
    force_words_ids: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Words (runs of tokens) that beam search must write: of each entry one of its alternatives."""
    json_schema: str | None = None
    """A JSON schema (text or mapping) that the text is valid by. Needs the extra "grammar"."""
    regex: str | None = None
    """A regular expression (Rust's syntax) that the whole text matches."""
    grammar: str | None = None
    """A grammar, in Lark's form or llama.cpp's GBNF, that the whole text follows."""
    trie: Any = None
    """A `Trie` of token runs, one of which the text is (De Cao et al. 2021)."""

    guidance_scale: float = 1.0
    """Classifier-free guidance: logits are moved away from those after the negative prompt by this
    factor (Sanchez et al. 2023). 1: not at all."""
    negative_prompt: str = ""
    """What guidance leads away from; without one, the last token of the prompt alone."""
    negative_prompt_ids: tuple[int, ...] = ()
    """The same as token ids."""

    num_beams: int = 1
    """Keep this many unfinished texts; 1 is greedy, or drawn."""
    length_penalty: float = 1.0
    """A text scores its log-probability / tokens ** this: above 0 favours long ones."""
    early_stopping: bool | str = False
    """With as many finished texts as beams: True stops; False stops unless the best unfinished
    one would beat the worst of them at its present length; "never" at any length."""
    num_beam_groups: int = 1
    """Beams search in so many groups, each away from those before it (Vijayakumar et al. 2018)."""
    diversity_penalty: float = 0.0
    """Taken off a token's score as often as groups before this one chose it at the same step."""
    penalty_alpha: float = 0.0
    """Contrastive search: weigh likeness to what was written by this against the probability of
    the `top_k` most likely tokens (Su et al. 2022). 0: off."""
    decoder_start_token_id: int | None = None
    """What the decoder of an encoder-decoder reads first; None: what the model or its tokenizer
    begins with."""
    num_return_sequences: int = 1
    """Texts for each prompt: drawn, or the best that beams found."""
    best_of: int | None = None
    """Write this many texts for each prompt and return the likeliest; None: all that are asked."""

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
        for name, value in normalized(self).items():
            object.__setattr__(self, name, value)
        check(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken; so too at temperatures where nothing else is."""
        return self.temperature < _NEARLY_GREEDY

    @property
    def speculates(self) -> bool:
        """Whether a token can be drawn before it is certain which ones stand before it."""
        return not self.mirostat

    @property
    def is_guided(self) -> bool:
        """Whether the model reads a second prompt, to be led away from."""
        return self.guidance_scale != 1

    @property
    def constrained(self) -> bool:
        """Whether a grammar says what may come."""
        return not (self.json_schema is None and self.regex is None and self.grammar is None)

    @property
    def is_formal(self) -> bool:
        """Whether a grammar or a trie says when the text is complete."""
        return self.constrained or self.trie is not None

    @property
    def forced_ids(self) -> tuple[int, ...]:
        """What every text begins with. Grammars and tries are about what follows it."""
        first = () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        return first + self.forced_prefix_ids

    @classmethod
    def recommended(cls, own: Mapping[str, Any], **changes: Any) -> Self:
        """What a checkpoint's `generation_config.json` recommends, with changes that win over it.

        Without do_sample, transformers would be greedy; the file says nothing about it, so neither
        do we: only where the text ends is taken from it.
        """
        if "do_sample" in own:
            return cls.from_hf(own, **changes)
        ends = {} if own.get("eos_token_id") is None else {"stop_token_ids": own["eos_token_id"]}
        return cls(**(ends | changes))

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], *, encoder_decoder: bool = False, **changes: Any
    ) -> Self:
        """From a `generation_config.json`, or a `config.json` of before there was one.

        `changes` win over it. `do_sample` false or absent is temperature 0, as there; without a
        `top_k` all tokens may be drawn (there: 50). `max_length` and `min_length` are read for an
        encoder_decoder, where they count the token that the decoder begins with; elsewhere they
        count the prompt and are not. A setting that would change the text and that nothing here
        does raises ConfigError.
        """
        known = {field.name for field in fields(cls)}
        for name, harmless in UNSUPPORTED.items():
            if raw.get(name) not in (None, *harmless):
                raise ConfigError(
                    f"generation setting {name}={raw[name]!r} is not supported; remove it"
                )
        for name in changes.keys() - known:
            raise ConfigError(f"there is no generation setting {name!r}; see GenerationConfig")
        values = {name: raw[name] for name in known & raw.keys() if raw[name] is not None}
        for theirs, ours in (("stop_strings", "stop"), ("eos_token_id", "stop_token_ids")):
            if raw.get(theirs):
                values[ours] = raw[theirs]
        if raw.get("eos_token_id") == 0:
            values["stop_token_ids"] = 0
        if isinstance(forced := values.get("forced_eos_token_id"), list):
            values["forced_eos_token_id"] = forced[0]
        if not raw.get("do_sample"):
            values["temperature"] = 0.0
        if encoder_decoder:
            _read_lengths(raw, values, changes)
        return cls(**(values | changes))


@dataclass(frozen=True, kw_only=True)
class SearchConfig(GenerationConfig):
    """A `GenerationConfig` that is greedy, or searches by beams, unless a temperature is given."""

    temperature: float = 0.0
    """Logits are divided by it. 0 is greedy, or, with several beams, beam search."""

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], *, encoder_decoder: bool = True, **changes: Any
    ) -> Self:
        """As `GenerationConfig.from_hf`, for an encoder-decoder."""
        return super().from_hf(raw, encoder_decoder=encoder_decoder, **changes)


def _read_lengths(raw: Mapping[str, Any], values: dict[str, Any], changes: dict[str, Any]) -> None:
    for old, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if raw.get(old) is not None:
            values.setdefault(new, max(raw[old] - 1, 0))
    if "max_new_tokens" in changes:
        # A shorter answer than the file has in mind is not made impossible by its least length.
        least = min(values.get("min_new_tokens", 0), changes["max_new_tokens"])
        changes.setdefault("min_new_tokens", least)
