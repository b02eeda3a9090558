"""OPUS tokenizers: source.spm and target.spm cut, and vocab.json numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from polyhead.errors import FileError
from polyhead.text.from_sentencepiece import PieceModel, PieceType, build, parse
from polyhead.text.special import SpecialTokens, TokenizerParts, frame

TARGETS = "\U0010ffff"
"""Before the name of a piece that only the target's model has: no source text is cut into it."""
_CONTROL = {"</s>": PieceType.CONTROL, "<pad>": PieceType.CONTROL, "<unk>": PieceType.UNKNOWN}


def read(folder: Path, vocab: Mapping[str, Any]) -> TokenizerParts:
    """Ids of `vocab`, which holds both languages' pieces: texts of the source language are cut by
    source.spm, those of the target's, as far as it is there, by target.spm.

    As transformers' slow tokenizer, but that a piece which the vocabulary lacks is cut into
    smaller ones instead of becoming unknown. Errors: FileError.
    """
    if (folder / "target_vocab.json").is_file():
        raise FileError(
            f"{folder} has a vocabulary for each language (target_vocab.json), which is not "
            "supported; use a model with one"
        )
    pieces = sorted(vocab, key=lambda piece: vocab[piece])
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or "<unk>" not in vocab:
        raise FileError(f"{folder / 'vocab.json'} does not number pieces and <unk> from 0")
    backend = _cutter(folder / "source.spm", pieces)
    backend.decoder = decoders.Sequence([decoders.Replace(TARGETS, ""), backend.decoder])
    frame(backend, None, "</s>")
    has_target = (folder / "target.spm").is_file()
    return TokenizerParts(
        backend=backend,
        special=SpecialTokens(unk="<unk>", eos="</s>", pad="<pad>" if "<pad>" in vocab else None),
        target=_cutter(folder / "target.spm", pieces) if has_target else None,
    )


def _cutter(file: Path, pieces: list[str]) -> tokenizers.Tokenizer:
    """Cuts texts by a SentencePiece model into `pieces`, whose places are the ids."""
    model, _ = parse(file)
    if model.kind != "unigram":
        raise FileError(f"{file} is {model.kind}, not unigram; it is not supported")
    scores = {
        piece: score
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
        if kind == PieceType.NORMAL
    }
    # A character that the model does not know is still found by its number.
    rare = min(scores.values(), default=0.0) - 10
    types = [_CONTROL.get(piece, _kind(piece)) for piece in pieces]
    is_own = [
        piece in scores or kind != PieceType.NORMAL or len(piece) == 1
        for piece, kind in zip(pieces, types, strict=True)
    ]
    names = [piece if own else TARGETS + piece for piece, own in zip(pieces, is_own, strict=True)]
    return build(
        PieceModel(
            kind="unigram",
            pieces=names,
            scores=[scores.get(piece, rare) for piece in pieces],
            types=types,
            unk_id=pieces.index("<unk>"),
            charsmap=model.charsmap,
            add_dummy_prefix=model.add_dummy_prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
        )
    )


def _kind(piece: str) -> PieceType:
    """Codes such as >>fra<< say which language is wanted."""
    is_code = piece.startswith(">>") and piece.endswith("<<")
    return PieceType.CONTROL if is_code else PieceType.NORMAL
