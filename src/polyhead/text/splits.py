"""How published byte-level vocabularies cut text before merging, by llama.cpp's names for them.

Each row is what the model's own tokenizer.json does. A name that is not here is refused: other
cuts than the merges were learned with give other ids.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _WORDS % ("", "", r"\p{N}")
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = _WORDS % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to cut: GPT-2's pattern, another one, or digits one by one before GPT-2's.

    `whole` words that are tokens are taken as they are, merges or not; `bos` is added when a
    file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """The cut, and bytes written as characters."""
        if self.pattern is not None:
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(self.pattern), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if not self.digits:
            return gpt2
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])

    def normalizer(self) -> Normalizer | None:
        """Unicode composition, where the model was trained on composed text."""
        return normalizers.NFC() if self.nfc else None


_GPT2_LIKE = Split()
_DIGITS = Split(digits=True)
_LLAMA3_LIKE = Split(pattern=_LLAMA3, whole=True, bos=True)
_QWEN2_LIKE = Split(pattern=QWEN2, nfc=True)

SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "mpt", "jais"), _GPT2_LIKE),
    "olmo": Split(nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_LIKE),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split(pattern=_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_LIKE),
    "stablelm2": Split(pattern=QWEN2),
    "tekken": Split(pattern=_TEKKEN, whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Split(pattern=_GPT4O)),
}
