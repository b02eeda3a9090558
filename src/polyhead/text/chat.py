"""Chat templates: messages to text, in one sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any

from polyhead.errors import FileError


def pick(templates: Mapping[str, str], name: str | None, tools: bool) -> str:
    """The template to use. Errors: FileError where there is none."""
    if name is None:
        name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise FileError(f"no chat template {name!r}; there are {list(templates)}")
    return templates[name]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
    )


def end_of_turn(template: str, roles: Mapping[str, str], specials: Sequence[str]) -> str | None:
    """The special token that ends an assistant's turn."""
    conversation = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "polyhead-probe"},
    ]
    text = render(template, conversation, **roles).partition("polyhead-probe")[2].lstrip()
    return max((s for s in specials if text.startswith(s)), key=len, default=None)
