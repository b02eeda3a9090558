"""Decoding one id at a time: the pieces add up to exactly what decoding all ids at once gives.

A decoder of the `tokenizers` library is a chain of stages over a list of strings. Each stage here
is the same rule, taking one string at a time and giving back what can no longer change, so a token
costs its own length, however long the text before it is.
"""

import codecs
import json
from typing import Any, Protocol

import tokenizers

from polyhead.text.train import byte_alphabet


class TextStream:
    """`push(id)` returns the text that id completes, whole characters only; `flush()` the rest."""

    def __init__(
        self, backend: tokenizers.Tokenizer, skip_special_tokens: bool = True, cleaned: bool = False
    ):
        self._backend = backend
        self._skipped: frozenset[int] = frozenset()
        if skip_special_tokens:
            added = backend.get_added_tokens_decoder().items()
            self._skipped = frozenset(i for i, token in added if token.special)
        self._stages = _stages(backend)
        if cleaned:
            self._stages.append(_CleanUp())

    def push(self, token_id: int) -> str:
        """The text that is certain now; often empty in the middle of a character."""
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        return "" if token is None else self._run([token], 0)

    def flush(self) -> str:
        """What was held back, at the end; the stream may not be pushed to afterwards."""
        rest = ""
        for i, stage in enumerate(self._stages):
            rest += self._run(stage.flush(), i + 1)
        return rest

    def _run(self, pieces: list[str], first: int) -> str:
        for stage in self._stages[first:]:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)


class _Stage(Protocol):
    def push(self, piece: str) -> list[str]: ...
    def flush(self) -> list[str]: ...


class _Each:
    """Base of the stages that hold nothing back; `first` is true until something went through."""

    def __init__(self) -> None:
        self.first = True

    def push(self, piece: str) -> list[str]:
        piece, self.first = self.change(piece), False
        return [piece]

    def change(self, piece: str) -> str:
        raise NotImplementedError

    def flush(self) -> list[str]:
        return []


class _Spaced(_Each):
    """No decoder: tokens with a space between."""

    def change(self, piece: str) -> str:
        return piece if self.first else " " + piece


class _Replace(_Each):
    def __init__(self, pattern: str, content: str):
        super().__init__()
        self.pattern, self.content = pattern, content

    def change(self, piece: str) -> str:
        return piece.replace(self.pattern, self.content)


class _Metaspace(_Each):
    """The mark is a space, except in the first token, where it was put there by encoding."""

    def __init__(self, replacement: str, prefixed: bool):
        super().__init__()
        self.replacement, self.prefixed = replacement, prefixed

    def change(self, piece: str) -> str:
        return piece.replace(self.replacement, "" if self.first and self.prefixed else " ")


class _WordPiece(_Each):
    """A space before every token that does not continue a word."""

    def __init__(self, prefix: str, cleaned: bool):
        super().__init__()
        self.prefix, self.cleaned = prefix, cleaned

    def change(self, piece: str) -> str:
        if not self.first:
            if piece.startswith(self.prefix):
                piece = piece[len(self.prefix) :]
            else:
                piece = " " + piece
        return clean_word(piece) if self.cleaned else piece


class _ByteLevel:
    """Every character is a byte; a character is given once its bytes are complete."""

    def __init__(self) -> None:
        self.bytes = {char: byte for byte, char in enumerate(byte_alphabet())}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        try:
            raw = bytes([self.bytes[char] for char in piece])
        except KeyError:  # an added token is written as it is
            raw = piece.encode()
        return [self.decoder.decode(raw)]

    def flush(self) -> list[str]:
        return [self.decoder.decode(b"", final=True)]


class _ByteFallback:
    """<0xE6><0x97><0xA5> is one character. A run of bytes is valid as a whole or not at all."""

    def __init__(self) -> None:
        self.run = bytearray()

    def push(self, piece: str) -> list[str]:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                self.run.append(int(piece[3:5], 16))
            except ValueError:
                pass
            else:
                return []
        return [*self.flush(), piece]

    def flush(self) -> list[str]:
        run, self.run = bytes(self.run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _Strip(_Each):
    """Characters cut from the start: of every token, or, once fused, of the whole text."""

    def __init__(self, content: str, most: int, fused: bool):
        super().__init__()
        self.content, self.most, self.fused = content, most, fused

    def change(self, piece: str) -> str:
        cut = 0
        while cut < min(self.most, len(piece)) and piece[cut] == self.content:
            cut += 1
        if self.fused:  # a character that stays ends the cutting
            self.most = 0 if cut < len(piece) else self.most - cut
        return piece[cut:]


class _Suffix:
    """A word's end is written on its last token: a space, but not after the last word."""

    def __init__(self, suffix: str):
        self.suffix = suffix
        self.last: str | None = None

    def push(self, piece: str) -> list[str]:
        last, self.last = self.last, piece
        return [] if last is None else [last.replace(self.suffix, " ")]

    def flush(self) -> list[str]:
        return [] if self.last is None else [self.last.replace(self.suffix, "")]


class _CleanUp:
    """The clean-up of whole texts, given up to a space that no rule can reach across."""

    def __init__(self) -> None:
        self.text = ""

    def push(self, piece: str) -> list[str]:
        self.text += piece
        cut = len(self.text)
        while (cut := self.text.rfind(" ", 1, cut)) > 0:
            before = self.text[:cut]
            if not before.endswith((" ", " '")):
                self.text = self.text[cut:]
                return [clean_up(before)]
        return []

    def flush(self) -> list[str]:
        return [clean_up(self.text)]


class _Whole:
    """A decoder not known here: nothing is certain before the end."""

    def __init__(self, decoder: tokenizers.decoders.Decoder):
        self.decoder = decoder
        self.tokens: list[str] = []

    def push(self, piece: str) -> list[str]:
        self.tokens.append(piece)
        return []

    def flush(self) -> list[str]:
        return [self.decoder.decode(self.tokens)]


def _stages(backend: tokenizers.Tokenizer) -> list[_Stage]:
    decoder = backend.decoder
    if decoder is None:
        return [_Spaced()]
    described = json.loads(decoder.__getstate__())
    chain = described["decoders"] if described["type"] == "Sequence" else [described]
    stages: list[_Stage] = []
    fused = False  # what comes after Fuse sees one string, not tokens
    for rule in chain:
        if rule["type"] == "Fuse":
            fused = True
            continue
        stage = _stage(rule, fused)
        if stage is None:
            return [_Whole(decoder)]
        fused = fused or rule["type"] == "ByteLevel"
        stages.append(stage)
    return stages


def _stage(rule: dict[str, Any], fused: bool) -> _Stage | None:
    kind = rule["type"]
    if kind == "Strip" and rule["stop"] == 0:
        return _Strip(rule["content"], rule["start"], fused)
    if kind == "Replace" and "String" in rule["pattern"]:
        pattern = rule["pattern"]["String"]
        return _Replace(pattern, rule["content"]) if not fused or len(pattern) == 1 else None
    if fused:
        return None
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "Metaspace":
        return _Metaspace(rule["replacement"], rule["prepend_scheme"] != "never")
    if kind == "WordPiece":
        return _WordPiece(rule["prefix"], rule["cleanup"])
    if kind == "BPEDecoder":
        return _Suffix(rule["suffix"])
    return None


_CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
)
_CLEANED_TEXT = (*_CLEANED, (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_CLEANED_WORD = (*_CLEANED, (" do not", " don't"), *_CLEANED_TEXT[-3:])


def clean_up(text: str) -> str:
    """English punctuation drawn to the word before it, as transformers does to a decoded text."""
    for written, meant in _CLEANED_TEXT:
        text = text.replace(written, meant)
    return text


def clean_word(word: str) -> str:
    """The same for one token, as the WordPiece decoder of `tokenizers` does."""
    for written, meant in _CLEANED_WORD:
        word = word.replace(written, meant)
    return word
