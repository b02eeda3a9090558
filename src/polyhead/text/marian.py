"""OPUS tokenizers: source.spm cuts, vocab.json numbers, and target words are put together again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import decoders

from polyhead.errors import FileError
from polyhead.text.from_sentencepiece import PieceModel, PieceType, build, parse
from polyhead.text.special import SpecialTokens, TokenizerParts, frame

# Before pieces that only the target's model has: no source text may be cut into them.
_TARGETS = "\U0010ffff"
_CONTROL = {"</s>": PieceType.CONTROL, "<pad>": PieceType.CONTROL, "<unk>": PieceType.UNKNOWN}


def read(folder: Path, vocab: Mapping[str, Any]) -> TokenizerParts:
    """Ids of `vocab`, which holds both languages' pieces, for texts of the source language.

    As transformers' slow tokenizer, but that a piece which the vocabulary lacks is cut into
    smaller ones instead of becoming unknown. Errors: FileError.
    """
    if (folder / "target_vocab.json").is_file():
        raise FileError(
            f"{folder} has a vocabulary for each language (target_vocab.json), which is not "
            "supported; use a model with one"
        )
    source, _ = parse(folder / "source.spm")
    if source.kind != "unigram":
        raise FileError(
            f"{folder / 'source.spm'} is {source.kind}, not unigram; it is not supported"
        )
    pieces = sorted(vocab, key=lambda piece: vocab[piece])
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))) or "<unk>" not in vocab:
        raise FileError(f"{folder / 'vocab.json'} does not number pieces and <unk> from 0")
    scores = {
        piece: score
        for piece, score, kind in zip(source.pieces, source.scores, source.types, strict=True)
        if kind == PieceType.NORMAL
    }
    least = min(scores.values(), default=0.0)
    types = [_CONTROL.get(piece, _kind(piece)) for piece in pieces]
    # A character that the source's model does not know is still found by its number.
    rare = least - 10
    names = [
        piece
        if piece in scores or kind != PieceType.NORMAL or len(piece) == 1
        else _TARGETS + piece
        for piece, kind in zip(pieces, types, strict=True)
    ]
    model = PieceModel(
        kind="unigram",
        pieces=names,
        scores=[scores.get(piece, rare) for piece in pieces],
        types=types,
        unk_id=vocab["<unk>"],
        charsmap=source.charsmap,
        add_dummy_prefix=source.add_dummy_prefix,
        remove_extra_whitespaces=source.remove_extra_whitespaces,
    )
    backend = build(model)
    backend.decoder = decoders.Sequence([decoders.Replace(_TARGETS, ""), backend.decoder])
    frame(backend, None, "</s>")
    pad = "<pad>" if "<pad>" in vocab else None
    return TokenizerParts(backend=backend, special=SpecialTokens(unk="<unk>", eos="</s>", pad=pad))


def _kind(piece: str) -> PieceType:
    """Codes such as >>fra<< say which language is wanted."""
    is_code = piece.startswith(">>") and piece.endswith("<<")
    return PieceType.CONTROL if is_code else PieceType.NORMAL
