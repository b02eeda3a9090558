"""Where words begin among tokens, whichever way a tokenizer says so. V vocabulary, T tokens."""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import decoders, models

from polyhead.text.train import byte_alphabet

_SPACES = " \u2581\u0120"  # a space, and how SentencePiece and byte-level BPE write it


@dataclass(frozen=True, eq=False)
class Words:
    """A token begins a word if it `opens` one, or if the token before `closes` one, bool [V]."""

    opens: np.ndarray
    closes: np.ndarray

    def starts(self, ids: np.ndarray) -> np.ndarray:
        """Whether a word begins at each token, bool like `ids` [..., T]; the first always does."""
        starts = self.opens[ids]
        starts[..., 1:] |= self.closes[ids[..., :-1]]
        starts[..., :1] = True
        return starts


def words_of(tokenizer: Any) -> Words:
    """The words of a tokenizer's vocabulary: letters and digits in a row, with the space before.

    WordPiece marks what goes on; SentencePiece and byte-level BPE mark what follows a space;
    punctuation is a word of its own, and so is a special token. Bytes above 127 are letters.
    """
    backend = tokenizer.backend
    size: int = tokenizer.vocab_size
    opens, closes = np.ones(size, bool), np.ones(size, bool)
    goes_on = ""
    if isinstance(backend.model, models.WordPiece):
        goes_on = backend.model.continuing_subword_prefix
    is_letter = _byte_letter() if isinstance(backend.decoder, decoders.ByteLevel) else _is_letter
    for token, index in tokenizer.vocab.items():
        if index in tokenizer.special_ids or not token:
            continue
        if goes_on:
            opens[index], closes[index] = not token.startswith(goes_on), False
        else:
            opens[index] = not is_letter(token[0])
            # A space belongs to the word that follows it.
            closes[index] = not (is_letter(token[-1]) or token[-1] in _SPACES)
    return Words(opens, closes)


def _is_letter(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")


def _byte_letter() -> Callable[[str], bool]:
    bytes_of = {char: byte for byte, char in enumerate(byte_alphabet())}

    def is_letter(char: str) -> bool:
        byte = bytes_of.get(char, ord(char))
        return byte > 127 or chr(byte).isalnum()

    return is_letter
