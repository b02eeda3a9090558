"""SentencePiece models: the .model file read without its library, and pieces made a tokenizer.

The file is a protobuf message; sentencepiece_model.proto of google/sentencepiece names its fields.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from polyhead.errors import FileError
from polyhead.text.special import SpecialTokens, TokenizerParts, add_special, frame

_SPACE = "▁"


class PieceType(IntEnum):
    """What a piece is for; a GGUF file's token types are the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class PieceModel:
    """Pieces with their scores and types, and how text is prepared for them."""

    kind: str  # "unigram" or "bpe"
    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk_id: int
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def build(model: PieceModel) -> Backend:
    """The tokenizer whose ids are SentencePiece's own.

    One difference is meant: control pieces written out in a text become their ids, as everywhere
    in this library, and what follows such a token is prepared like a text of its own.
    """
    unk = model.pieces[model.unk_id]
    fallback = PieceType.BYTE in model.types
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    if model.kind == "unigram":
        scored = list(zip(model.pieces, map(float, model.scores), strict=True))
        core = models.Unigram(scored, unk_id=model.unk_id, byte_fallback=fallback)
    else:
        core = models.BPE(
            vocab=vocab,
            merges=_merges(model, vocab),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    backend = Backend(core)
    backend.normalizer = _normalizer(model)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if model.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    wanted = {PieceType.CONTROL: True, PieceType.UNKNOWN: True, PieceType.USER_DEFINED: False}
    by_flag: dict[bool, list[str]] = {True: [], False: []}
    for piece, kind in zip(model.pieces, model.types, strict=True):
        if kind in wanted:
            by_flag[wanted[PieceType(kind)]].append(piece)
    add_special(backend, by_flag[True])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in by_flag[False]])
    return backend


def _merges(model: PieceModel, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best score first.

    SentencePiece joins the neighbours whose union scores highest; ranking the joins of all pieces
    by score makes BPE do the same.
    """
    learned = (PieceType.NORMAL, PieceType.USER_DEFINED)
    usable = {piece: i for piece, i in vocab.items() if model.types[i] in learned and piece}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, i in usable.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-model.scores[i], i, cut, left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _normalizer(model: PieceModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the library raises bare Exception
            raise FileError(f"the normalisation table cannot be read: {error}") from None
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


# Classes that put something around a text: (bos, eos). Others put nothing.
_FRAMES = {
    "LlamaTokenizer": (True, False),
    "CodeLlamaTokenizer": (True, False),
    "GemmaTokenizer": (True, False),
    "T5Tokenizer": (False, True),
}
# Classes that give the pieces other ids than their file does.
_RENUMBERED = (
    "XLMRoberta", "Camembert", "MBart", "NLLB", "Nllb", "Pegasus", "XGLM", "Barthez", "M2M100",
    "Marian", "Albert", "XLNet", "BigBird", "Reformer", "Deberta", "Rembert", "Speech2Text",
)  # fmt: skip


def read_model(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    """A SentencePiece .model file, unigram or BPE. Errors: FileError."""
    owner = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if owner.startswith(_RENUMBERED):
        raise FileError(
            f"{path} belongs to a {owner}, which changes its ids or its text; "
            "convert the tokenizer to tokenizer.json"
        )
    model, named = parse(path, config)
    backend = build(model)
    bos, eos = _FRAMES.get(owner, (False, False))
    frame(
        backend,
        named.bos if config.get("add_bos_token", bos) else None,
        named.eos if config.get("add_eos_token", eos) else None,
    )
    return TokenizerParts(backend=backend, special=named)


def parse(path: Path, config: Mapping[str, Any] | None = None) -> tuple[PieceModel, SpecialTokens]:
    """What a .model file holds. Errors: FileError."""
    try:
        return _parse(path.read_bytes(), config or {})
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    except _BadModelError as error:
        raise FileError(f"{path} is no SentencePiece model: {error}") from None


class _BadModelError(Exception):
    pass


def _parse(data: bytes, config: Mapping[str, Any]) -> tuple[PieceModel, SpecialTokens]:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_text(piece.get(1, b"")))
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(_number(piece.get(3, PieceType.NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces or not trainer or not normalizer:
        raise _BadModelError("pieces, trainer or normalizer settings are missing; is it cut short?")
    kind = {1: "unigram", 2: "bpe"}.get(_number(trainer.get(3, 1)))
    if kind is None:
        raise _BadModelError("its type is neither unigram nor BPE")
    if _number(trainer.get(24, 0)):
        raise _BadModelError("it writes spaces behind words, which is not supported")
    unk_id = _signed(trainer.get(40, 0))
    if not 0 <= unk_id < len(pieces):
        raise _BadModelError(f"its unknown piece {unk_id} is not among its {len(pieces)} pieces")
    prefix = bool(_number(normalizer.get(3, 1))) and config.get("add_prefix_space") is not False
    model = PieceModel(
        kind=kind,
        pieces=pieces,
        scores=scores,
        types=types,
        unk_id=unk_id,
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=bool(_number(normalizer.get(4, 1))),
    )
    ids = {"unk": unk_id, "bos": _signed(trainer.get(41, 1)), "eos": _signed(trainer.get(42, 2))}
    ids["pad"] = _signed(trainer.get(43, -1))
    named = {role: pieces[i] for role, i in ids.items() if 0 <= i < len(pieces)}
    return model, SpecialTokens(**named)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: number, and a varint or the bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _BadModelError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise _BadModelError(f"a field of {size} bytes at {at} runs past the end")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _BadModelError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _BadModelError(f"a number at byte {at} is too long")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _BadModelError("a number stands where text is expected")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _BadModelError("text stands where a number is expected")
    return value


def _signed(value: int | bytes) -> int:
    number = _number(value) & 0xFFFFFFFF
    return number - 2**32 if number >= 2**31 else number


def _text(value: int | bytes) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise _BadModelError("a piece is not UTF-8") from None
