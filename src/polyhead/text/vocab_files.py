"""Vocabularies from before tokenizer.json: BERT's vocab.txt, GPT-2's vocab.json with merges.txt."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from polyhead.errors import FileError
from polyhead.text.special import SpecialTokens, TokenizerParts, add_special, frame_bert
from polyhead.text.splits import QWEN2

_BERT = SpecialTokens(pad="[PAD]", unk="[UNK]", mask="[MASK]", cls="[CLS]", sep="[SEP]")
_GPT2 = SpecialTokens(unk="<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>")
_QWEN2 = SpecialTokens(eos="<|endoftext|>", pad="<|endoftext|>")
_ROBERTA = SpecialTokens(
    pad="<pad>", unk="<unk>", bos="<s>", eos="</s>", mask="<mask>", cls="<s>", sep="</s>"
)


def read_wordpiece(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    """vocab.txt, one token a line; `do_lower_case` (true unless said otherwise) from the config."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as text: {error}") from None
    if lines[-1] == "":
        lines.pop()
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    roles = _present(_BERT, config, vocab)
    if roles.unk is None or roles.cls is None or roles.sep is None:
        raise FileError(
            f"{path} has no [UNK], [CLS] or [SEP], so it is no BERT vocabulary; "
            "convert the tokenizer to tokenizer.json"
        )
    backend = Backend(models.WordPiece(vocab=vocab, unk_token=roles.unk))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    add_special(backend, roles.distinct())
    frame_bert(backend, roles.cls, roles.sep)
    return TokenizerParts(backend=backend, special=roles)


def read_bpe(vocab_path: Path, merges_path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    """vocab.json and merges.txt: GPT-2's byte-level BPE, and RoBERTa's and Qwen2's like it."""
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    defaults = {
        "GPT2Tokenizer": _GPT2,
        "PreTrainedTokenizer": _GPT2,
        "RobertaTokenizer": _ROBERTA,
        "Qwen2Tokenizer": _QWEN2,
    }
    if kind not in defaults:
        raise FileError(
            f"{vocab_path.parent} has only vocab.json and merges.txt of a {kind}, which is not "
            f"known here ({', '.join(defaults)}); convert it to tokenizer.json"
        )
    vocab, merges = _vocab(vocab_path), _merges(merges_path)
    try:
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise FileError(f"{merges_path} does not fit {vocab_path.name}: {error}") from None
    prefix = bool(config.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    roles = _present(defaults[kind], config, vocab)
    add_special(backend, roles.distinct())
    if kind == "RobertaTokenizer" and roles.cls is not None and roles.sep is not None:
        backend.post_processor = processors.RobertaProcessing(
            (roles.sep, vocab[roles.sep]),
            (roles.cls, vocab[roles.cls]),
            add_prefix_space=prefix,
        )
    return TokenizerParts(backend=backend, special=roles)


def _present(
    defaults: SpecialTokens, config: Mapping[str, Any], vocab: Mapping[str, int]
) -> SpecialTokens:
    """The format's usual roles, as far as the vocabulary has them, or what the config says."""
    roles: dict[str, str | None] = {}
    for role, token in defaults.items():
        stated = config.get(f"{role}_token", token)
        token = stated.get("content") if isinstance(stated, dict) else stated
        roles[role] = token if token in vocab else None
    return SpecialTokens(**roles)


def _vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from None
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise FileError(f"{path} is no vocabulary: an object of tokens with their ids is expected")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as text: {error}") from None
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [tuple(line.split(" ")) for line in lines if line.strip()]
    for merge in merges:
        if len(merge) != 2:
            raise FileError(f"{path} has the line {' '.join(merge)!r}; two tokens are expected")
    return [(left, right) for left, right in merges]
