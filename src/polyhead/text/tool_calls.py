"""How a chat template writes calls of tools, and those calls read back out of a model's text."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from polyhead.errors import ConfigError, PolyheadError
from polyhead.text.tokenizer import Tokenizer

_NAME, _KEY, _SAID = "probe_name", "probe_key", "probe_content"
_ARGUMENTS = {_KEY: "probe_value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "a probe",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_JSON = json.JSONDecoder()


class Call(NamedTuple):
    """A tool's name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """What stands around a call, as the model's own template writes it.

    opening: before a call, special tokens left out as they are in texts; prompt: the same with
    them. name_key, arguments_key: of the JSON object that a call is; where the name stands outside
    of the JSON, name_key is empty, and between is what parts it from the arguments.
    closing: after a call.
    """

    opening: str
    prompt: str
    closing: str
    name_key: str = ""
    arguments_key: str = ""
    between: str = ""

    def schema(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A JSON schema of what follows `prompt` where a call of one of these must come.

        Errors: ConfigError for several tools whose name stands outside of the JSON.
        """
        functions = [tool["function"] for tool in tools]
        given = [each.get("parameters") or {"type": "object"} for each in functions]
        if not self.name_key:
            if len(functions) > 1:
                raise ConfigError(
                    "this model's template writes names outside of the JSON; let tool_choice name "
                    "one function"
                )
            return given[0]
        calls = [
            {
                "type": "object",
                "properties": {
                    self.name_key: {"const": each["name"]},
                    self.arguments_key: parameters,
                },
                "required": [self.name_key, self.arguments_key],
                "additionalProperties": False,
            }
            for each, parameters in zip(functions, given, strict=True)
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def begun(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """What is put behind the prompt where a call of one of these must come."""
        if self.name_key:
            return self.prompt
        return f"{self.prompt}{tools[0]['function']['name']}{self.between}"

    def heard(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The same as texts show it, for who reads what comes after it."""
        return self.opening + ("" if self.name_key else tools[0]["function"]["name"] + self.between)


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """How the tokenizer's chat template writes a call; None where it writes none, or none in JSON.

    The template is asked: a conversation with a call is rendered, and compared with one without.
    """
    asked = [{"role": "user", "content": "x"}]
    call = {
        "id": "abcdefghi", "type": "function",
        "function": {"name": _NAME, "arguments": _ARGUMENTS},
    }  # fmt: skip
    try:
        before = tokenizer.apply_chat_template(asked, tools=[_TOOL], add_generation_prompt=True)
        if _NAME not in before:
            return None
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        after, plain = (
            tokenizer.apply_chat_template([*asked, m], tools=[_TOOL], add_generation_prompt=False)
            for m in (said, {"role": "assistant", "content": _SAID})
        )
    except PolyheadError:
        return None
    same = (i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y)
    written = after[next(same, min(len(before), len(after))) :]
    written = written.removesuffix(plain.partition(_SAID)[2])
    if _NAME not in written or _KEY not in written:
        return None
    return _of_object(tokenizer, written) or _of_parts(tokenizer, written)


def _of_object(tokenizer: Tokenizer, written: str) -> ToolFormat | None:
    """The call is an object that holds the name."""
    for start in (match.start() for match in re.finditer("{", written[: written.index(_NAME)])):
        found, end = _decoded(written, start)
        call = _object(found, lambda each: _NAME in each.values())
        if call is not None:
            name_key = next(key for key, value in call.items() if value == _NAME)
            key = next((key for key, value in call.items() if _KEY in str(value)), "")
            opening = _visible(tokenizer, written[:start].rstrip().removesuffix("["))
            closing = _visible(tokenizer, written[end:].lstrip().removeprefix("]"))
            return ToolFormat(opening, written[:start], closing, name_key, key) if key else None
    return None


def _of_parts(tokenizer: Tokenizer, written: str) -> ToolFormat | None:
    """The name stands before the JSON of its arguments."""
    at = written.index(_NAME)
    start = written.rfind("{", 0, written.index(_KEY))
    found, end = _decoded(written, start) if start > at else (None, 0)
    opening = _visible(tokenizer, written[:at])
    if found != _ARGUMENTS or not opening:
        return None
    between, closing = written[at + len(_NAME) : start], _visible(tokenizer, written[end:])
    return ToolFormat(opening, written[:at], closing, between=between)


def _visible(tokenizer: Tokenizer, text: str) -> str:
    """Text as it is seen when a model has written it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON that begins there, and where it ends; None where it is none or does not end."""
    try:
        return _JSON.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _object(found: Any, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The first such object, here or deeper."""
    if not isinstance(found, dict):
        return None
    here = cast(dict[str, Any], found)
    if is_it(here):
        return here
    return next((deep for each in here.values() if (deep := _object(each, is_it))), None)


class CallReader:
    """Text as it comes, parted into what is said and calls.

    names: of the tools. Where a template puts nothing before a call, only JSON with one of these
    names, at the very beginning, is one.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str]) -> None:
        self.form, self.names = form, tuple(names)
        self._kept, self._has_called = "", False

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """What is certain so far: text that is said, and calls that are whole."""
        self._kept += text
        said = "" if self._has_called else self._before()
        calls: list[Call] = []
        while found := self._next():
            calls += found
        return said, calls

    def end(self) -> str:
        """What was held back and is no call."""
        rest, self._kept = self._kept, ""
        if not self._has_called:
            return rest
        for mark in (self.form.closing, self.form.opening):
            rest = rest.replace(mark, "") if mark else rest
        return "" if not rest.strip(" \t\r\n,]") else rest.strip()

    def _before(self) -> str:
        """Take what cannot be part of a call."""
        opening = self.form.opening
        if not opening:
            begin = self._kept.lstrip()[:1]
            count = 0 if begin in ("", "{", "[") else len(self._kept)
        elif opening in self._kept:
            count = self._kept.index(opening)
        else:
            most = min(len(opening) - 1, len(self._kept))
            held = next((n for n in range(most, 0, -1) if opening.startswith(self._kept[-n:])), 0)
            count = len(self._kept) - held
        said, self._kept = self._kept[:count], self._kept[count:]
        return said

    def _next(self) -> list[Call]:
        """The calls of the next place where there are some, which are taken off the text."""
        start = self._kept.find(self.form.opening) if self.form.opening else 0
        if start < 0:
            return []
        at = start + len(self.form.opening)
        name = None
        if not self.form.name_key:
            parts = rf"\s*([\w.-]+)\s*{re.escape(self.form.between.strip())}\s*"
            matched = re.compile(parts).match(self._kept, at)
            if matched is None:
                return []
            name, at = matched[1], matched.end()
        at += len(self._kept[at:]) - len(self._kept[at:].lstrip(" \t\r\n,"))
        found, end = _decoded(self._kept, at)
        calls = [] if found is None else self._calls(found, name)
        if calls:
            self._kept, self._has_called = self._kept[end:], True
        return calls

    def _calls(self, found: Any, name: str | None) -> list[Call]:
        if name is not None:
            return [Call(name, _written(found))]
        calls: list[Call] = []
        name_key, listed = self.form.name_key, found if isinstance(found, list) else [found]
        for each in cast(list[Any], listed):
            call = _object(each, lambda here: isinstance(here.get(name_key), str))
            if call is None or not (self.form.opening or call[name_key] in self.names):
                return []
            given = call.get(self.form.arguments_key, {})
            calls.append(Call(call[name_key], _written(given)))
        return calls


def _written(arguments: Any) -> str:
    """Arguments as JSON; those that a template writes as a text are JSON already."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
