"""A file of prompts: what each of its lines asks."""

import difflib
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.lines import kind_of, lines, objects, unzipped
from polyhead.generate.config import GenerationConfig
from polyhead.generate.intake import rows_of
from polyhead.generate.prompts import Message

_OBJECTS = (".jsonl", ".ndjson")
_NO_LINES = (".json", ".csv", ".tsv", ".parquet")
_SETTINGS = {item.name for item in fields(GenerationConfig)}
_ASKS = ("prompt", "messages", "system", "tools")
_ANSWER = ("line", "text", "texts", "finish_reason", "prompt_tokens", "tokens", "error")
# How alike a field is to a setting for it to be meant as one.
_ALIKE, _LONG = 0.8, 6


@dataclass(frozen=True)
class Asked:
    """What a line asks. fields: what it says but for its settings, to be said again by its answer.

    prompt: None where there are `messages`. settings: fields of `GenerationConfig` of its own.
    """

    line: int
    fields: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def prompt(self) -> str | None:
        return self.fields.get("prompt")

    @property
    def question(self) -> str:
        """What the model is to read, whatever else the line says."""
        return json.dumps({name: self.fields[name] for name in _ASKS if name in self.fields})

    def messages(self, system: str | None) -> list[Message]:
        """It as a conversation; system: the message before it that has none of its own."""
        turns = self.fields.get("messages") or [{"role": "user", "content": self.prompt}]
        if turns[0]["role"] == "system":
            return turns
        said = self.fields.get("system", system)
        return turns if said is None else [{"role": "system", "content": said}, *turns]

    @property
    def needs_template(self) -> str | None:
        """A field that only a chat template can write."""
        return next((name for name in _ASKS[1:] if name in self.fields), None)

    def config(self, base: GenerationConfig) -> GenerationConfig:
        """How it is to be answered. Errors: ConfigError for settings that cannot be."""
        return replace(base, **self.settings) if self.settings else base


@dataclass(frozen=True)
class Overview:
    """What is known of a file before any of it is answered.

    prompts: how many. rows: texts at once that one asks for at most. readings: how often a
    prompt is held at most: texts share theirs, but where they are guided. most_bytes: of the
    longest line. most_tokens: of a text that answers. digest: SHA-256 of the file and of how it is
    read.
    """

    prompts: int
    rows: int
    readings: int
    most_bytes: int
    most_tokens: int
    digest: str


class PromptFile:
    """Prompts from a file that can be read again: lines of text, or JSON objects (.jsonl, .ndjson),
    zipped (.gz) or not. Under the name "-" they are objects where the first line begins with "{".

    Blank lines are passed over. Errors, with the line: DataError for what is no prompt.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, "standard input" if name == "-" else name
        kind = kind_of(Path(name)).lower()
        if kind in _NO_LINES:
            raise DataError(f"{name} is no file of prompts: write text, or JSON lines (.jsonl)")
        self.has_objects = kind in _OBJECTS
        if name == "-":
            file.seek(0)
            first = next((line for line in file if line.strip()), b"")
            self.has_objects = first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")

    def __iter__(self) -> Iterator[Asked]:
        self.file.seek(0)
        path = Path(self.name)
        raw = unzipped(self.file, path)
        try:
            if self.has_objects:
                for number, row in objects(raw, path):
                    yield _asked(row, number, f"{path}, line {number}")
                return
            for number, text in enumerate(lines(raw, path), 1):
                if text.strip():
                    yield Asked(number, {"prompt": text.rstrip("\r\n")}, {})
        except (OSError, EOFError, zlib.error) as error:
            raise FileError(f"cannot read {self.name}: {error}; write it again") from None

    def look_over(self, base: GenerationConfig, has_template: bool) -> Overview:
        """Read all of it once. Errors, with the line: DataError for what cannot be asked.

        has_template: whether prompts are put into one.
        """
        prompts = most_bytes = 0
        readings = 1
        rows, most_tokens = rows_of(base), base.max_new_tokens
        for asked in self:
            where = f"{self.name}, line {asked.line}"
            if asked.needs_template and not has_template:
                raise DataError(
                    f"{where}: {asked.needs_template} need a chat template; none is used"
                )
            try:
                config = asked.config(base)
            except (ConfigError, TypeError) as error:
                raise DataError(f"{where}: {error}") from None
            prompts += 1
            rows = max(rows, rows_of(config))
            readings = max(readings, rows_of(config) if config.is_guided else 1)
            most_tokens = max(most_tokens, config.max_new_tokens)
            led_away = len(config.negative_prompt.encode()) + len(config.negative_prompt_ids)
            most_bytes = max(most_bytes, _bytes(asked, where), led_away)
        if not prompts:
            raise DataError(f"{self.name} holds no prompts; write one a line")
        self.file.seek(0)
        digest = hashlib.file_digest(self.file, "sha256")
        digest.update(b"objects" if self.has_objects else b"lines")
        return Overview(prompts, rows, readings, most_bytes, most_tokens, digest.hexdigest())


def _asked(row: Any, line: int, where: str) -> Asked:
    """A line's object, looked over but for the values of its settings."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is {str(row)[:40]!r}; write an object with a prompt or messages")
    row = {name: value for name, value in row.items() if value is not None or name not in _ASKS}
    if ("prompt" in row) == ("messages" in row):
        both = "both prompt and messages" if "prompt" in row else "neither prompt nor messages"
        raise DataError(f"{where} has {both}; give one of them")
    for name in ("prompt", "system"):
        if not isinstance(row.get(name, ""), str):
            raise DataError(f"{where}: {name} is {row[name]!r:.40}; it must be text")
    for name in ("messages", "tools"):
        found = row.get(name, [{}])
        if not isinstance(found, list) or not found or not all(isinstance(x, dict) for x in found):
            raise DataError(f"{where}: {name} is {found!r:.40}; it must be a list of objects")
    if not all(isinstance(each.get("role"), str) for each in row.get("messages", ())):
        raise DataError(f'{where}: a message has no "role"; each must have one')
    if "system" in row and row.get("messages", [{}])[0].get("role") == "system":
        raise DataError(f"{where} has a system message twice; give it once")
    for name in row.keys() - _SETTINGS:
        if name in _ANSWER:
            raise DataError(f"{where}: {name!r} is a field of answers; call it something else")
        if len(name) >= _LONG and (near := difflib.get_close_matches(name, _SETTINGS, 1, _ALIKE)):
            raise DataError(
                f"{where}: {name!r} is no setting; write {near[0]}, or call it something else"
            )
    settings = {name: row[name] for name in row.keys() & _SETTINGS if row[name] is not None}
    told = {name: value for name, value in row.items() if name not in _SETTINGS}
    return Asked(line, told, settings)


def _bytes(asked: Asked, where: str) -> int:
    """An upper bound of its length. Errors: DataError for half a character."""
    try:
        return len(json.dumps(asked.fields, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a character (a lone surrogate); mend it") from None
