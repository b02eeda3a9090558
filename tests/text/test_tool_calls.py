"""What a template writes as calls of tools is read back, however it comes."""

import json
from typing import Any

import pytest

import polyhead as ph
from polyhead.text.tool_calls import Call, CallReader, ToolFormat, tool_format

TURN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TOOLS_SAID = "{% if tools %}{{ tools | tojson }}{% endif %}"
# As Qwen and Hermes, Mistral, LLaMA 3, DeepSeek, and OpenAI's own objects write them.
TEMPLATES = {
    "tags": TOOLS_SAID
    + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|end|>{% endfor %}" + TURN,
    "list": TOOLS_SAID
    + "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]<|end|>{% else %}[INST] {{ m.content }}"
    "[/INST]{% endif %}{% endfor %}",
    "bare": TOOLS_SAID + "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    "<|end|>{% endfor %}" + TURN,
    "parts": TOOLS_SAID
    + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>function<sep>{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```"
    "</call>{% endfor %}{% endfor %}" + TURN,
    "nested": TOOLS_SAID
    + "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}functools["
    "{% for c in m.tool_calls %}{{ {'type': 'function', 'function': {'name': c.function.name, "
    "'arguments': c.function.arguments | tojson}} | tojson }}{% if not loop.last %}, {% endif %}"
    "{% endfor %}]{% endif %}{% endfor %}" + TURN,
}
SPECIAL = ("<|end|>", "<|assistant|>", "<|user|>", "[TOOL_CALLS]", "[INST]", "[/INST]")
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "time")
]
CALLS = [
    Call("get_weather", '{"city": "Paris {x} \\"]", "days": [1, 2]}'),
    Call("time", '{"zone": "日本 <tool_call>"}'),
]
SAID = "Let me see <b> [1] {2}."


def tokenizer(name: str, special: bool = False) -> ph.Tokenizer:
    words = ph.Tokenizer.train(["x"], kind="bytes", extra_tokens=SPECIAL if special else ())
    words.chat_templates["default"] = TEMPLATES[name]
    return words


def form_of(name: str, special: bool = False) -> ToolFormat:
    form = tool_format(tokenizer(name, special))
    assert form is not None
    return form


def written(name: str, calls: list[Call], content: str = "") -> str:
    words = tokenizer(name)
    asked = [{"role": "user", "content": "q"}]
    told = [
        {
            "id": "abcdefghi", "type": "function",
            "function": {"name": call.name, "arguments": json.loads(call.arguments)},
        }
        for call in calls
    ]  # fmt: skip
    answer = {"role": "assistant", "content": content, "tool_calls": told}
    before = words.apply_chat_template(asked, tools=TOOLS, add_generation_prompt=True)
    after = words.apply_chat_template([*asked, answer], tools=TOOLS, add_generation_prompt=False)
    assert after.startswith(before)
    return after[len(before) :].removesuffix("<|end|>")


def read(form: ToolFormat, text: str, size: int) -> tuple[str, list[Call], str]:
    reader, said, calls = CallReader(form, ["get_weather", "time"]), "", list[Call]()
    for start in range(0, len(text), size):
        more, found = reader.feed(text[start : start + size])
        said, calls = said + more, calls + found
    return said, calls, reader.end()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_is_read(name: str, count: int, size: int) -> None:
    calls = CALLS[: 1 if name == "bare" else count]
    content = "" if name in ("list", "bare") else SAID
    said, found, rest = read(form_of(name), written(name, calls, content), size)
    assert (said.strip(), rest) == (content, "")
    assert [each.name for each in found] == [each.name for each in calls]
    assert [json.loads(each.arguments) for each in found] == [
        json.loads(each.arguments) for each in calls
    ]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_no_call_is_said(name: str, size: int) -> None:
    form = form_of(name)
    half = form.opening + '{"name": "get_wea'
    others = ["", SAID, '{"a": 1}', "[1, 2]", half, "{", '{"name": "other", "parameters": {}}']
    for text in others:
        said, calls, rest = read(form, text, size)
        assert (said + rest, calls) == (text, []), text


def test_special_tokens_are_not_waited_for() -> None:
    form = form_of("list", special=True)
    assert (form.opening, form.prompt, form.closing) == ("", "[TOOL_CALLS] [", "")
    text = written("list", CALLS).removeprefix("[TOOL_CALLS]")
    assert [each.name for each in read(form, text, 3)[1]] == ["get_weather", "time"]


def test_text_behind_calls_is_kept() -> None:
    text = written("tags", CALLS[:1]) + "\nDone."
    _, calls, rest = read(form_of("tags"), text, 4)
    assert (len(calls), rest) == (1, "Done.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_must_come_is_a_call(name: str) -> None:
    form = form_of(name)
    one = form.schema(TOOLS[:1])
    if form.name_key:
        assert one["properties"][form.name_key] == {"const": "get_weather"}
        assert len(form.schema(TOOLS)["anyOf"]) == 2
        body = json.dumps({form.name_key: "time", form.arguments_key: {"a": 1}})
    else:
        assert one == {"type": "object"}
        with pytest.raises(ph.ConfigError, match="let tool_choice name one"):
            form.schema(TOOLS)
        body = '{"a": 1}'
    assert written(name, CALLS[1:]).lstrip().startswith(form.begun(TOOLS[1:]).strip())
    reader = CallReader(form, ["time"])
    reader.feed(form.heard(TOOLS[1:]))
    assert reader.feed(body)[1] == [Call("time", '{"a": 1}')]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        TOOLS_SAID + "{% for m in messages %}{{ m.content }}{% endfor %}",
        TOOLS_SAID + "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}",
        TOOLS_SAID + "{% for m in messages %}{% for c in m.tool_calls or [] %}<function="
        "{{ c.function.name }}>{% endfor %}{% endfor %}",
    ],
)
def test_templates_that_write_no_calls(template: str) -> None:
    words = ph.Tokenizer.train(["x"], kind="bytes")
    words.chat_templates["default"] = template
    assert tool_format(words) is None
    assert tool_format(ph.Tokenizer.train(["x"], kind="bytes")) is None
