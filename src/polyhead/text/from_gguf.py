"""The tokenizer inside a GGUF file, from its metadata."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from polyhead.errors import FileError
from polyhead.text.from_sentencepiece import PieceModel, PieceType, build
from polyhead.text.special import SpecialTokens, TokenizerParts, add_special, frame
from polyhead.text.splits import SPLITS

_ROLES = {
    "pad": "padding",
    "unk": "unknown",
    "bos": "bos",
    "eos": "eos",
    "mask": "mask",
    "cls": "cls",
    "sep": "seperator",  # llama.cpp spells it so
}
_STOPS = ("eos", "eot", "eom")


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """A byte-level BPE ("gpt2"), SentencePiece BPE ("llama") or unigram ("t5") vocabulary.

    Errors: FileError for a file without a vocabulary, one that contradicts itself, or a kind of
    vocabulary or cut (`tokenizer.ggml.pre`) that is not known here.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise FileError("this GGUF file holds no tokenizer (tokenizer.ggml.model); name another")
    if model not in _BUILDERS:
        raise FileError(
            f"tokenizer.ggml.model is {model!r}; supported are {', '.join(map(repr, _BUILDERS))}"
        )
    tokens, types = _vocabulary(metadata)
    backend, bos, eos = _BUILDERS[model](metadata, tokens, types)
    roles = _roles(metadata, tokens)
    add_special(backend, roles.distinct())
    frame(
        backend,
        roles.bos if metadata.get("tokenizer.ggml.add_bos_token", bos) else None,
        roles.eos if metadata.get("tokenizer.ggml.add_eos_token", eos) else None,
    )
    stops = [_token_id(metadata, f"tokenizer.ggml.{name}_token_id", tokens) for name in _STOPS]
    return TokenizerParts(
        backend=backend,
        special=roles,
        stops=tuple(i for i in stops if i is not None),
        chat_templates=_templates(metadata),
    )


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _list(metadata, "tokens", str)
    if not tokens:
        raise FileError("tokenizer.ggml.tokens is missing or empty; the file has no vocabulary")
    types = _list(metadata, "token_type", int) or [PieceType.NORMAL] * len(tokens)
    _check_length("token_type", types, tokens)
    return tokens, types


def _list(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """An array of the file as a list of one type; empty where it is missing."""
    values = metadata.get(f"tokenizer.ggml.{name}", ())
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, kind) for v in values):
        raise FileError(f"tokenizer.ggml.{name} is no array of the right type")
    return list(values)


def _check_length(name: str, values: list[Any], tokens: list[str]) -> None:
    if len(values) != len(tokens):
        raise FileError(f"tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens")


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Backend, bool, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise FileError(
            f"tokenizer.ggml.pre is {name!r}, a way to cut text that is not known here "
            f"({', '.join(SPLITS)}); use the model's tokenizer.json"
        )
    split = SPLITS[name]
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    try:
        core = models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole)
    except Exception as error:  # the library raises bare Exception
        raise FileError(f"tokenizer.ggml.merges does not fit the tokens: {error}") from None
    backend = Backend(core)
    normalizer = split.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == PieceType.CONTROL]
    add_special(backend, control)
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == PieceType.USER_DEFINED
        ]
    )
    return backend, split.bos, False


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], kind: str
) -> Backend:
    scores = _list(metadata, "scores", (int, float))
    _check_length("scores", scores, tokens)
    unk_id = _token_id(metadata, "tokenizer.ggml.unknown_token_id", tokens)
    charsmap = _list(metadata, "precompiled_charsmap", int)
    return build(
        PieceModel(
            kind=kind,
            pieces=tokens,
            scores=scores,
            types=types,
            unk_id=0 if unk_id is None else unk_id,
            charsmap=bytes(b & 0xFF for b in charsmap),
            add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            remove_extra_whitespaces=bool(
                metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
            ),
        )
    )


def _llama(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Backend, bool, bool]:
    return _sentencepiece(metadata, tokens, types, "bpe"), True, False


def _t5(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Backend, bool, bool]:
    return _sentencepiece(metadata, tokens, types, "unigram"), False, True


# Each gives the tokenizer and whether bos and eos are added where the file does not say.
_BUILDERS = {"gpt2": _byte_level, "llama": _llama, "t5": _t5}


def _roles(metadata: Mapping[str, Any], tokens: list[str]) -> SpecialTokens:
    ids = {
        role: _token_id(metadata, f"tokenizer.ggml.{name}_token_id", tokens)
        for role, name in _ROLES.items()
    }
    return SpecialTokens(**{role: tokens[i] for role, i in ids.items() if i is not None})


def _token_id(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise FileError(f"{key} is {token_id!r}, but there are {len(tokens)} tokens")
    return token_id


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    found = {"default": metadata.get(prefix)}
    for key, template in metadata.items():
        if key.startswith(f"{prefix}."):
            found[key.removeprefix(f"{prefix}.")] = template
    return {name: template for name, template in found.items() if isinstance(template, str)}
