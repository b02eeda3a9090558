"""Tokens as a reader would see them, one by one."""

import unicodedata
from collections.abc import Iterable

from polyhead.text.tokenizer import Tokenizer


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each id, the space before a word included; of a part of a letter, its bytes."""
    return [_piece(tokenizer, i) for i in ids]


def is_mark(tokenizer: Tokenizer, i: int) -> bool:
    """Whether a token parts others: a special one, a space or punctuation; no part of a letter."""
    if i in tokenizer.special_ids:
        return True
    text = tokenizer.backend.decode([i], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        return (tokenizer.backend.id_to_token(i) or "").startswith("▁")
    return all(
        unicodedata.category(sign)[0] in "PZC" or (sign.isascii() and not sign.isalnum())
        for sign in text
    )


def _piece(tokenizer: Tokenizer, i: int) -> str:
    token = tokenizer.backend.id_to_token(i)
    if token is None:
        return f"<{i}>"
    if token.startswith("▁"):  # SentencePiece's space, which decoding a single piece would drop
        return " " + token[1:].replace("▁", " ")
    text = tokenizer.backend.decode([i], skip_special_tokens=False)
    return token if not text or "\ufffd" in text else text
