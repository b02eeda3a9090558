"""A `GenerationConfig` on the command line: its fields as options, in groups that help shows."""

import ast
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import tyro

from polyhead.cli.common import given_fields
from polyhead.generate.config import GenerationConfig

# All but `trie`, which no words of a command line can say.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "length": (
        "How long a text is, and what ends it.",
        ("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos",
         "forced_eos_token_id", "exponential_decay_length_penalty"),
    ),
    "drawing": (
        "Which of the likely tokens comes next.",
        ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
         "mirostat", "mirostat_tau", "mirostat_eta", "seed"),
    ),
    "repetition": (
        "What was there before becomes less likely.",
        ("repetition_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier",
         "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
         "no_repeat_ngram_size"),
    ),
    "wording": (
        "What may not come, and what must.",
        ("logit_bias", "sequence_bias", "bad_words_ids", "suppress_tokens",
         "begin_suppress_tokens", "forced_bos_token_id", "forced_prefix_ids", "force_words_ids",
         "guidance_scale", "negative_prompt", "negative_prompt_ids"),
    ),
    "form": (
        "What the whole text must look like.",
        ("json_schema", "regex", "grammar"),
    ),
    "search": (
        "Several texts of a prompt, and the best of them.",
        ("num_return_sequences", "best_of", "num_beams", "length_penalty", "early_stopping",
         "num_beam_groups", "diversity_penalty", "penalty_alpha", "decoder_start_token_id"),
    ),
    "answer": (
        "What is said of a text.",
        ("logprobs", "skip_special_tokens"),
    ),
}  # fmt: skip


def config_of(settings: Any) -> GenerationConfig:
    """What a `Settings` comes to. Errors: ConfigError for values that cannot be."""
    groups = [vars(getattr(settings, name)) for name in GROUPS]
    return GenerationConfig(**{name: value for group in groups for name, value in group.items()})


def named(argv: Sequence[str]) -> tuple[str, ...]:
    """The settings that a command line names: these alone win over the model's."""
    return tuple(sorted(given_fields(argv, [item.name for item in fields(GenerationConfig)])))


def with_own(
    config: GenerationConfig, given: Sequence[str], own: Mapping[str, Any]
) -> GenerationConfig:
    """The settings that were given, else what the checkpoint recommends, else the defaults."""
    if not own:
        return config
    flags = {name: value for name, value in asdict(config).items() if name in given}
    return GenerationConfig.recommended(own, **flags)


def _grouped() -> type[Any]:
    """A class of a field for each group, which is a class of its options."""
    known, hints = (
        {item.name: item for item in fields(GenerationConfig)},
        get_type_hints(GenerationConfig),
    )
    said = _said(GenerationConfig)
    groups: list[Any] = []
    for name, (about, options) in GROUPS.items():
        made = make_dataclass(
            name.title(),
            [
                (option, Annotated[hints[option], tyro.conf.arg(help=said[option])],
                 field(default=known[option].default))
                for option in options
            ],
            frozen=True,
        )  # fmt: skip
        groups.append(
            (name, Annotated[made, tyro.conf.arg(help=about)], field(default_factory=made))
        )
    return make_dataclass("Settings", groups, frozen=True)


def _said(config: type[Any]) -> dict[str, str]:
    """The text below each field of a class."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        item.target.id: " ".join(text.value.value.split())
        for item, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


Settings = _grouped()
