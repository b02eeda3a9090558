"""The bytes that each token of a tokenizer writes."""

import json
import re
from collections.abc import Callable
from typing import Any

from polyhead.errors import ConfigError
from polyhead.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """One entry an id, empty for ids between that no token has.

    Errors: ConfigError for tokenizers whose tokens do not simply follow each other in the text, as
    WordPiece.
    """
    spelled = _spelling(tokenizer)
    added = tokenizer.backend.get_added_tokens_decoder()
    found = [b""] * tokenizer.vocab_size
    for token, number in tokenizer.vocab.items():
        found[number] = token.encode() if number in added else spelled(token)
    return found


def _spelling(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """What a token of the vocabulary writes, by how the tokenizer decodes."""
    saved: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    decoder: dict[str, Any] = saved.get("decoder") or {"type": "none"}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return _from_byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _from_pieces
    if kinds == {"Fuse"}:
        return str.encode
    raise ConfigError(
        f"a grammar needs a tokenizer whose tokens make the text side by side; this one decodes "
        f"by {decoder['type']}"
    )


def _from_pieces(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def _from_byte_level(token: str) -> bytes:
    return b"".join(_BYTES.get(c, c.encode()) for c in token)


def _byte_level() -> dict[str, bytes]:
    """GPT-2's letters for bytes: the printable ones stand for themselves, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_level()
