"""Tools through the openai client: calls found in what a model writes, and calls that must come."""

import json
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.conftest import Server, Start
from tests.text.test_tool_calls import TEMPLATES

pytest.importorskip("llguidance")

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["x", "y"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PLACE}},
    {
        "type": "function",
        "function": {"name": "time", "description": "now", "parameters": ZONE},
    },
]
ASKED: list[Any] = [{"role": "user", "content": "what is the weather?"}]
WRITTEN = 'I see.\n<tool_call>\n{"name": "time", "arguments": {"zone": "x"}}\n</tool_call>\n' * 2


@pytest.fixture(scope="module")
def server(start: Start, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    place = tmp_path_factory.mktemp("tools")
    for name in ("tags", "parts"):
        shutil.copytree(folder, place / name)
        (place / name / "chat_template.jinja").write_text(TEMPLATES[name])
    return start(models=sorted(place.iterdir()))


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asked(client: openai.OpenAI, stream: bool, **named: Any) -> tuple[str, list[Any], str]:
    """The text, the calls as (name, arguments), and the reason."""
    given: dict[str, Any] = dict(messages=ASKED, tools=TOOLS, max_tokens=300, temperature=1, seed=2)
    found: Any = client.chat.completions.create(**(given | named), stream=stream)
    if not stream:
        choice = found.choices[0]
        calls = choice.message.tool_calls or []
        assert len({call.id for call in calls}) == len(calls)
        told = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
        return choice.message.content or "", told, choice.finish_reason
    text, reason, parts = "", "", dict[int, list[str]]()
    for chunk in found:
        (choice,) = chunk.choices
        text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            part = parts.setdefault(call.index, ["", ""])
            part[0] += call.function.name or ""
            part[1] += call.function.arguments or ""
    assert sorted(parts) == list(range(len(parts)))
    return text, [(name, json.loads(arguments)) for name, arguments in parts.values()], reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["tags", "parts"])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_call_that_must_come(
    model: str, choice: Any, stream: bool, client: openai.OpenAI
) -> None:
    tools = TOOLS[:1] if model == "parts" and choice == "required" else TOOLS
    text, calls, reason = asked(client, stream, model=model, tool_choice=choice, tools=tools)
    assert (text, len(calls), reason) == ("", 1, "tool_calls")
    name, arguments = calls[0]
    assert name in ("get_weather", "time") if choice == "required" else name == "get_weather"
    if name == "get_weather":
        assert arguments in [{"city": c, "days": d} for c in ("Paris", "Rome") for d in (1, 2)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("several", [True, False])
def test_calls_that_a_model_makes(several: bool, stream: bool, client: openai.OpenAI) -> None:
    forced = {"type": "grammar", "grammar": f"start: {json.dumps(WRITTEN)}"}
    text, calls, reason = asked(
        client, stream, model="tags", parallel_tool_calls=several,
        extra_body={"response_format": forced},
    )  # fmt: skip
    assert calls == [("time", {"zone": "x"})] * (2 if several else 1)
    assert reason == "tool_calls"
    assert text.startswith("I see.")
    plain = asked(
        client, stream, model="tags", tool_choice="none", extra_body={"response_format": forced}
    )
    assert plain == (WRITTEN, [], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_text_without_calls_is_as_without_tools(stream: bool, client: openai.OpenAI) -> None:
    forced = {"type": "grammar", "grammar": 'start: "1 < 2, and <tool is fine"'}
    text, calls, reason = asked(
        client, stream, model="tags", extra_body={"response_format": forced}
    )
    assert (text, calls, reason) == ("1 < 2, and <tool is fine", [], "stop")


def test_a_conversation_goes_on_with_what_tools_said(client: openai.OpenAI) -> None:
    first: Any = client.chat.completions.create(
        model="tags", messages=ASKED, tools=TOOLS, tool_choice="required", max_tokens=300,
    )  # fmt: skip
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert message.content is None
    more = [*ASKED, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(model="tags", messages=more, tools=TOOLS, max_tokens=5)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "tiny"}, "writes no calls of tools"),
        ({"tools": openai.omit, "tool_choice": "required"}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x', not a tool"),
        ({"model": "parts", "tool_choice": "required"}, "let tool_choice name one"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
        ({"messages": [{"role": "user", "content": None}]}, "content is missing"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], told: str, client: openai.OpenAI) -> None:
    given: dict[str, Any] = dict(model="tags", messages=ASKED, tools=TOOLS, max_tokens=3)
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(**(given | changes))
