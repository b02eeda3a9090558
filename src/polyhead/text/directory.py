"""Tokenizer files: Hugging Face's directory layout, read and written; single files, read."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from polyhead.errors import FileError
from polyhead.text import from_sentencepiece, marian, vocab_files
from polyhead.text.special import ROLES, SpecialTokens, TokenizerParts, add_special, frame

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_TARGET = "target_tokenizer.json"
# entries of tokenizer_config.json that say nothing this library acts on, and others may need
_KEPT = ("model_max_length", "model_input_names", "do_lower_case", "response_schema")


def read(path: Path, special: Mapping[str, str | None] | None = None) -> TokenizerParts:
    """A directory or a single file; `special` changes the roles it states. Errors: FileError."""
    if path.is_dir():
        return _read_directory(path, special)
    if not path.is_file():
        raise FileError(f"no tokenizer at {path}: there is no such file or directory")
    config: dict[str, Any] = {}
    return _finish(_read_file(path, config), config, special)


def _read_file(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    if path.suffix == ".json":
        return _read_json(path)
    if path.suffix == ".model":
        return from_sentencepiece.read_model(path, config)
    if path.suffix == ".txt":
        return vocab_files.read_wordpiece(path, config)
    hint = "; open it as a GGUF file and use from_gguf" if path.suffix == ".gguf" else ""
    raise FileError(
        f"{path.name} is no tokenizer file known here (tokenizer.json, vocab.txt, *.model){hint}"
    )


def _read_directory(path: Path, special: Mapping[str, str | None] | None) -> TokenizerParts:
    config = read_json(path / _CONFIG) if (path / _CONFIG).is_file() else {}
    if (path / _SPECIAL).is_file():
        config = {**read_json(path / _SPECIAL), **config}
    if (path / "tokenizer.json").is_file():
        parts = _read_json(path / "tokenizer.json")
        if (path / _TARGET).is_file():
            parts = replace(parts, target=_read_json(path / _TARGET).backend)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        parts = vocab_files.read_bpe(path / "vocab.json", path / "merges.txt", config)
    elif (path / "source.spm").is_file() and (path / "vocab.json").is_file():
        parts = marian.read(path, read_json(path / "vocab.json"))
    elif models := sorted(path.glob("*.model")):
        parts = from_sentencepiece.read_model(models[0], config)
    elif (path / "vocab.txt").is_file():
        parts = vocab_files.read_wordpiece(path / "vocab.txt", config)
    else:
        raise FileError(
            f"no tokenizer in {path}: none of tokenizer.json, vocab.json with merges.txt or "
            "source.spm, *.model, vocab.txt is there"
        )
    return _finish(
        parts,
        config,
        special,
        added=read_json(path / "added_tokens.json") if _has(path, "added_tokens.json") else {},
        templates=_templates(path, config),
        stops=_stops(path),
    )


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file()


def _read_json(path: Path) -> TokenizerParts:
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, or its panic, which is none
        raise FileError(f"{path} is no tokenizer.json: {_one_line(error)}") from None
    described = _top_level(text)
    pad = (described.get("padding") or {}).get("pad_token")
    # Padding and cutting are asked for in the call; what a file bakes in would act on every text.
    backend.no_padding()
    backend.no_truncation()
    unk = getattr(backend.model, "unk_token", None)
    return TokenizerParts(backend=backend, special=SpecialTokens(unk=unk, pad=pad))


def _top_level(text: str) -> dict[str, Any]:
    """`padding` of a tokenizer.json without parsing the vocabulary behind it a second time."""
    found = text.find('"padding"')
    if found < 0 or text[found:].partition(":")[2].lstrip().startswith("null"):
        return {}
    described = json.loads(text)
    return described if isinstance(described, dict) else {}


def _finish(
    parts: TokenizerParts,
    config: Mapping[str, Any],
    special: Mapping[str, str | None] | None,
    *,
    added: Mapping[str, Any] | None = None,
    templates: Mapping[str, str] | None = None,
    stops: tuple[int, ...] = (),
) -> TokenizerParts:
    """What the configuration beside a vocabulary adds to it: roles, tokens, template, stops."""
    backend = parts.backend
    stated = {r: _content(config[f"{r}_token"]) for r in ROLES if f"{r}_token" in config}
    roles = parts.special.updated(stated).updated(special)
    _add_tokens(backend, _listed_tokens(config, added or {}))
    add_special(backend, _not_special(backend, roles.distinct()))
    # The post-processor of tokenizer.json has the word; the flags speak where it adds nothing.
    if backend.num_special_tokens_to_add(False) == 0:
        frame(
            backend,
            roles.bos if config.get("add_bos_token") else None,
            roles.eos if config.get("add_eos_token") else None,
        )
    return TokenizerParts(
        backend=backend,
        special=roles,
        stops=stops or parts.stops,
        chat_templates=templates or parts.chat_templates,
        clean_up=bool(config.get("clean_up_tokenization_spaces", False)),
        config={key: config[key] for key in _KEPT if key in config},
        target=parts.target,
    )


def _listed_tokens(
    config: Mapping[str, Any], added: Mapping[str, Any]
) -> list[tuple[int | None, tokenizers.AddedToken]]:
    """Tokens named beside the vocabulary, with the id they must get where one is stated."""
    found: list[tuple[int | None, tokenizers.AddedToken]] = []
    for token_id, token in _mapping(config, "added_tokens_decoder").items():
        if not str(token_id).isdecimal():
            raise FileError(f"added_tokens_decoder of {_CONFIG} has the id {token_id!r}")
        found.append((int(token_id), _added_token(token)))
    for token, token_id in added.items():
        if not isinstance(token_id, int):
            raise FileError(f"added_tokens.json gives {token!r} the id {token_id!r}")
        found.append((token_id, _added_token(token)))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = config.get(key) or []
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if not isinstance(tokens, list):
            raise FileError(f"{key} of {_CONFIG} is {tokens!r}; a list of tokens is expected")
        found += [(None, _added_token(token, special=True)) for token in tokens]
    return sorted(found, key=lambda pair: (pair[0] is None, pair[0] or 0))


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise FileError(f"{key} of {_CONFIG} is a {type(value).__name__}; an object is expected")
    return value


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[tuple[int | None, tokenizers.AddedToken]]
) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = [(i, token) for i, token in tokens if token.content not in known]
    backend.add_tokens([token for _, token in new])
    for i, token in new:
        if i is not None and backend.token_to_id(token.content) != i:
            raise FileError(
                f"added token {token.content!r} should have id {i} but would get "
                f"{backend.token_to_id(token.content)}; the vocabulary and its config do not match"
            )


def _not_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> list[str]:
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    return [token for token in tokens if token not in special]


def _content(token: Any) -> str | None:
    """A token is a string, or a dictionary that has it under "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise FileError(f"a special token is stated as {token!r}; a string is expected")
    return content or None


def _added_token(token: Any, special: bool = False) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, normalized=False, special=special)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise FileError(f"an added token is stated as {token!r}; a string is expected")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    chosen = {flag: bool(token[flag]) for flag in flags if flag in token}
    return tokenizers.AddedToken(token["content"], **{"special": special, **chosen})


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name; the file wins over the configuration, which has one text or a list of named ones."""
    stated = config.get("chat_template") or {}
    if isinstance(stated, str):
        stated = {"default": stated}
    elif isinstance(stated, list):
        try:
            stated = {entry["name"]: entry["template"] for entry in stated}
        except (TypeError, KeyError):
            raise FileError(
                f"chat_template of {path / _CONFIG} is a list whose entries are not "
                '{"name": ..., "template": ...}'
            ) from None
    if not isinstance(stated, dict) or not all(isinstance(t, str) for t in stated.values()):
        raise FileError(f"chat_template of {path / _CONFIG} is neither a text nor named texts")
    found: dict[str, str] = dict(stated)
    if _has(path, "chat_template.jinja"):
        found["default"] = _read_text(path / "chat_template.jinja")
    for file in sorted(path.glob("additional_chat_templates/*.jinja")):
        found[file.stem] = _read_text(file)
    return found


def _stops(path: Path) -> tuple[int, ...]:
    if not _has(path, _GENERATION):
        return ()
    stated = read_json(path / _GENERATION).get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(i for i in ids if isinstance(i, int))


def write(path: Path, parts: TokenizerParts, force: bool) -> None:
    """The directory that `read` and transformers read; each file appears whole or not at all."""
    special = {f"{role}_token": token for role, token in parts.special.items()}
    templates = dict(parts.chat_templates)
    target = parts.target
    files: dict[str, Callable[[Path], object]] = {
        "tokenizer.json": lambda file: parts.backend.save(str(file), pretty=True),
        _CONFIG: lambda file: _write_json(
            file,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": parts.clean_up,
                "model_input_names": _input_names(parts.special),
                **parts.config,
                **special,
            },
        ),
        _SPECIAL: lambda file: _write_json(file, special),
    }
    if target is not None:
        files[_TARGET] = lambda file: target.save(str(file), pretty=True)
    for name, text in templates.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise FileError(f"the chat template's name {name!r} is no file name; rename it")
        file_name = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        files[f"{file_name}.jinja"] = lambda file, text=text: file.write_text(
            text, encoding="utf-8", newline=""
        )
    present = [name for name in files if (path / name).exists()]
    if present and not force:
        raise FileError(f"{path / present[0]} is there already; pass force=True to overwrite it")
    if len(parts.stops) > 1 and not (path / _GENERATION).exists():
        files[_GENERATION] = lambda file: _write_json(file, {"eos_token_id": list(parts.stops)})
    for name, fill in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path / name, fill)
    if force:  # what another tokenizer left
        for name in {"chat_template.jinja", _TARGET} - files.keys():
            (path / name).unlink(missing_ok=True)


def state_length(path: Path, max_tokens: int | None) -> None:
    """Write what a model takes as `model_max_length` of the tokenizer beside it, unless that says
    less.

    transformers truncates by it alone. None, for a model that nothing bounds, writes nothing.
    """
    file = path / _CONFIG
    if max_tokens is None or not file.is_file():
        return
    config = read_json(file)
    stands = config.get("model_max_length")
    if not isinstance(stands, int | float) or stands > max_tokens:
        stated = {**config, "model_max_length": max_tokens}
        _write_whole(file, lambda draft: _write_json(draft, stated))


def _input_names(special: SpecialTokens) -> list[str]:
    pairs = ["token_type_ids"] if special.cls is not None and special.sep is not None else []
    return ["input_ids", *pairs, "attention_mask"]


def _write_whole(path: Path, fill: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    draft = Path(name)
    try:
        fill(draft)
        draft.chmod(0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FileError for anything else."""
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as text: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
