"""A tokenizer.json as GGUF metadata, the reverse of text/from_gguf.py.

llama.cpp knows three kinds: "gpt2" (byte-level BPE, cut by a named rule), "llama" (SentencePiece
BPE, merged by the score of what a merge gives) and "t5" (unigram).
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, FileError
from polyhead.files.gguf_write import typed

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "mask_token": "mask",
    "cls_token": "cls",
    "sep_token": "seperator",  # llama.cpp spells it so
}


def tokenizer_of(directory: str | Path, vocab_size: int | None = None) -> dict[str, Any]:
    """`tokenizer_metadata` of a Hugging Face directory; empty where it has no tokenizer.json."""
    folder = Path(directory)
    if not (folder / "tokenizer.json").exists():
        return {}
    config = _json(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer_metadata(_json(folder / "tokenizer.json"), config, vocab_size=vocab_size)


def tokenizer_metadata(
    tokenizer: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    pre: str | None = None,
) -> dict[str, Any]:
    """The tokenizer.* metadata for a tokenizer.json and its tokenizer_config.json.

    vocab_size: rows of the embedding; ids without a token are filled up as unused. pre: llama.cpp's
    name of the cut, found by itself for those this library reads. Errors: ConfigError for a kind of
    tokenizer that GGUF cannot hold.
    """
    config = config or {}
    model = tokenizer.get("model") or {}
    tokens, types = _vocabulary(tokenizer, vocab_size)
    metadata: dict[str, Any] = {}
    steps = list(_parts(tokenizer.get("pre_tokenizer")))
    if model.get("type") == "Unigram":
        metadata["tokenizer.ggml.model"] = "t5"
        scores = [score for _, score in model["vocab"]]
        metadata |= _sentencepiece(tokenizer, scores, tokens, types)
    elif model.get("type") == "BPE" and any(step.get("type") == "ByteLevel" for step in steps):
        metadata["tokenizer.ggml.model"] = "gpt2"
        metadata["tokenizer.ggml.pre"] = pre or _cut(tokenizer)
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(model)]
    elif model.get("type") == "BPE":
        metadata["tokenizer.ggml.model"] = "llama"
        metadata["tokenizer.ggml.pre"] = "default"
        scores = _merge_scores(tokens, _merges(model))
        metadata |= _sentencepiece(tokenizer, scores, tokens, types)
    else:
        raise ConfigError(
            f"a tokenizer of kind {model.get('type')!r} cannot be written as GGUF here "
            "(known: BPE, Unigram)"
        )
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = types
    ids = {token: number for number, token in enumerate(tokens)}
    roles = {name: _content(config.get(name)) for name in ROLES}
    roles["unk_token"] = roles["unk_token"] or _unknown(model)
    for name, token in roles.items():
        if token in ids:
            metadata[f"tokenizer.ggml.{ROLES[name]}_token_id"] = ids[token]
    first, last = _frame(tokenizer.get("post_processor"))
    metadata["tokenizer.ggml.add_bos_token"] = first is not None and first == roles["bos_token"]
    metadata["tokenizer.ggml.add_eos_token"] = last is not None and last == roles["eos_token"]
    if isinstance(config.get("chat_template"), str):
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata


def _vocabulary(
    tokenizer: Mapping[str, Any], vocab_size: int | None
) -> tuple[list[str], list[int]]:
    """Every id's token and llama.cpp's kind of it."""
    model = tokenizer.get("model") or {}
    vocab = model.get("vocab") or {}
    if not isinstance(vocab, Mapping):  # a unigram model's list of pairs
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    by_id = {number: token for token, number in vocab.items()}
    kinds = {
        number: BYTE if token.startswith("<0x") and len(token) == 6 else NORMAL
        for number, token in by_id.items()
    }
    for row in tokenizer.get("added_tokens") or ():
        by_id[row["id"]] = row["content"]
        kinds[row["id"]] = CONTROL if row.get("special") else USER_DEFINED
    unknown = _unknown(model)
    if model.get("type") == "Unigram" or model.get("byte_fallback"):
        kinds |= {number: UNKNOWN for number, token in by_id.items() if token == unknown}
    count = max(by_id, default=-1) + 1
    if vocab_size is not None and vocab_size < count:
        raise ConfigError(
            f"the tokenizer has {count} tokens, the embedding {vocab_size} rows; they do not fit"
        )
    size = vocab_size or count
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], [
        kinds.get(i, UNUSED) for i in range(size)
    ]


def _merges(model: Mapping[str, Any]) -> list[list[str]]:
    """Merges as pairs; older files write each as one string."""
    rows = model.get("merges") or []
    return [row.split(" ") if isinstance(row, str) else list(row) for row in rows]


def _cut(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way this tokenizer cuts and composes text."""
    from tokenizers import Tokenizer, models

    from polyhead.text.splits import SPLITS  # only here: tokenizers is slow to import

    def essence(data: Mapping[str, Any]) -> tuple[Any, ...]:
        steps = [dict(step) for step in _parts(data.get("pre_tokenizer"))]
        for step in steps:
            step.pop("trim_offsets", None)
        names = [step.get("type") for step in _parts(data.get("normalizer"))]
        return steps, names, bool((data.get("model") or {}).get("ignore_merges"))

    wanted = essence(tokenizer)
    for name, split in SPLITS.items():
        example = Tokenizer(models.BPE(ignore_merges=split.whole))
        example.pre_tokenizer = split.pre_tokenizer()
        normalizer = split.normalizer()
        if normalizer is not None:
            example.normalizer = normalizer
        if essence(json.loads(example.to_str())) == wanted:
            return name
    raise ConfigError(
        "this tokenizer cuts text in a way that llama.cpp has no name for here; give `pre`"
    )


def _merge_scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores by which SentencePiece would merge in the same order; errors where none do."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    known, pairs = set(tokens), {(left, right) for left, right in merges}
    order = [ranks[left + right] for left, right in merges]
    splits = (
        (token[:i], token[i:]) for token in ranks for i in range(1, len(token)) if token in known
    )
    missing = next((p for p in splits if p not in pairs and known.issuperset(p)), None)
    if missing or order != sorted(order):
        raise ConfigError(
            "the merges are not SentencePiece's, which GGUF's kind 'llama' needs; "
            "GGUF cannot hold this tokenizer"
        )
    return [-float(ranks[token]) if token in ranks else -float(len(merges)) for token in tokens]


def _sentencepiece(
    tokenizer: Mapping[str, Any], scores: list[float], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Scores for every token, and how spaces and characters are prepared."""
    scores = [*scores, *[0.0] * (len(tokens) - len(scores))]
    scores = [
        0.0 if kind in (CONTROL, BYTE, UNUSED) else float(score)
        for score, kind in zip(scores, types, strict=True)
    ]
    cuts = [s for s in _parts(tokenizer.get("pre_tokenizer")) if s.get("type") == "Metaspace"]
    norms = list(_parts(tokenizer.get("normalizer")))
    prefix = any(step.get("type") == "Prepend" for step in norms) or any(
        step.get("prepend_scheme", "always") != "never" for step in cuts
    )
    metadata: dict[str, Any] = {
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": any(
            step.get("type") == "Replace" and step.get("pattern", {}).get("Regex") == " {2,}"
            for step in norms
        ),
    }
    for step in norms:
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            raw = base64.b64decode(step["precompiled_charsmap"])
            metadata["tokenizer.ggml.precompiled_charsmap"] = typed(list(raw), "uint8")
    return metadata


def _parts(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A step of a tokenizer.json, or the steps of a sequence."""
    if not step:
        return
    inner = step.get("pretokenizers") or step.get("normalizers") or step.get("processors")
    if step.get("type") != "Sequence":
        yield step
    for part in inner or ():
        yield from _parts(part)


def _frame(post: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The special tokens that a template puts before and after a text."""
    for step in _parts(post):
        if step.get("type") == "TemplateProcessing":
            single = [part.get("SpecialToken", {}).get("id") for part in step.get("single", ())]
            return (single[0], single[-1]) if single else (None, None)
    return None, None


def _unknown(model: Mapping[str, Any]) -> str | None:
    if model.get("type") == "Unigram" and isinstance(model.get("unk_id"), int):
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or a table with its content."""
    return token.get("content") if isinstance(token, Mapping) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(data, dict):
        raise FileError(f"{path}: not an object; fetch it again")
    return data
