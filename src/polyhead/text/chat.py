"""Chat templates: messages in, the text that the model was taught to continue out.

Every template, whoever sent it, is rendered in the one sandbox of `sandbox.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.text.budget import MAX_TEMPLATE, MAX_VALUE, Budget, LimitError, budgeted
from polyhead.text.sandbox import Environment, RefusedError


def pick(templates: Mapping[str, str], name: str | None = None, tools: bool = False) -> str:
    """The template of that name; without one "tool_use" for tools if there is one, else "default".

    Errors: ConfigError where there is no such template.
    """
    if not templates:
        raise ConfigError(
            "messages need a chat template and this tokenizer has none; give plain text, or a "
            "template to the tokenizer"
        )
    if name is None:
        name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ConfigError(
            f"there is no chat template named {name!r}; the names are {', '.join(templates)}"
        )
    return templates[name]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation; `tools` are JSON schemas, `variables` what else templates read.

    Errors: DataError for messages that are no list of JSON-like objects or that the template
    refuses; FileError for a template that does not parse, reaches out of the sandbox, or takes more
    than a second or too much memory.
    """
    seen = {
        "documents": None,
        **_plain(variables, "variables"),
        "messages": _reasoned(_checked(_plain(messages, "messages"))),
        "tools": None if tools is None else _plain(tools, "tools"),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with budgeted():
            compiled = _compiled(template)
        with budgeted() as budget:
            _check_size(seen, budget)
            return _bounded(compiled.generate(seen), budget)
    except Exception as error:
        raise _ours(error) from None


def _check_size(seen: Mapping[str, Any], budget: Budget) -> None:
    try:
        budget.weigh(list(seen.values()))
    except LimitError:
        raise DataError(
            f"the messages hold more than {MAX_VALUE} characters; shorten them"
        ) from None


def _bounded(pieces: Iterable[str], budget: Budget) -> str:
    found: list[str] = []
    length = 0
    for piece in pieces:
        found.append(piece)
        budget.spend(len(piece))
        length += len(piece)
        if length > MAX_VALUE:
            raise LimitError(f"it writes more than {MAX_VALUE} characters")
    return "".join(found)


_environment = Environment()


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    if not isinstance(template, str):
        raise FileError(f"the chat template is a {type(template).__name__}, not a string")
    if len(template) > MAX_TEMPLATE:
        raise FileError(
            f"the chat template has {len(template)} characters; {MAX_TEMPLATE} are allowed"
        )
    return _environment.from_string(template)


def _ours(error: Exception) -> PolyheadError:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, PolyheadError):
        return error
    if isinstance(error, TemplateSyntaxError):
        return FileError(f"line {error.lineno} of the chat template does not parse: {text}")
    if isinstance(error, LimitError):
        return FileError(f"the chat template is refused: {text}")
    if isinstance(error, SecurityError):
        return FileError(f"the chat template is refused as unsafe: {text}")
    if isinstance(error, RefusedError):
        return DataError(f"the chat template refuses these messages: {text}")
    if isinstance(error, UndefinedError):
        return DataError(f"the chat template needs what these messages lack: {text}")
    if isinstance(error, (RecursionError, MemoryError, OverflowError, SyntaxError)):
        return FileError(f"the chat template is refused: it nests or grows too far ({text})")
    kind = type(error).__name__
    return DataError(f"the chat template fails on these messages: {kind}: {text}")


def _plain(value: Any, name: str) -> Any:
    """A copy of nothing but JSON types: what a template sees has no methods of its own."""
    try:
        return _copied(value, name)
    except RecursionError:
        raise DataError(f"{name} are nested too deeply for a chat template") from None


def _copied(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {_copied(k, name): _copied(v, name) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(v, name) for v in value]
    raise DataError(f"{name} hold a {type(value).__name__}; templates take JSON values only")


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a list of at least one {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"message {i} is {str(message)[:60]!r}; expected {{'role': ..., 'content': ...}}"
            )
    return messages


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _reasoned(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasoning under the names that templates read, whichever of them it came under."""
    for message in messages:
        found = next((message[k] for k in _REASONING if message.get(k) is not None), None)
        if found is not None:
            message.setdefault("thinking", found)
            message["reasoning_content"] = found
    return messages


def end_of_turn(template: str, roles: Mapping[str, str], specials: Sequence[str]) -> str | None:
    """Which of `specials` the template writes after an assistant's words, if any.

    A probe is rendered and read, so no token is taken for an end by its name. Templates that leave
    the last turn open are asked again with a question after it.
    """
    words = "polyhead-probe"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
    for conversation in (turns, [*turns, {"role": "user", "content": "b"}]):
        try:
            text = render(template, conversation, **roles)
        except PolyheadError:
            continue
        after = text.partition(words)[2].lstrip()
        found = max((s for s in specials if after.startswith(s)), key=len, default=None)
        if found is not None:
            return found
    return None
