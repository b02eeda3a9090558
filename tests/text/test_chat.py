import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.text.chat import end_of_turn, pick, render
from polyhead.text.tokenizer import Tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("only single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ("user", "assistant") and not message.get("tool_calls") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant/user/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" and message.get("content") %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
        message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role }}
        {% generation %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n' }}
        {%- endif %}
        {{- '\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "user" or not loop.first or not tools %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TRICKS = """\
{%- macro list_of(items, sep=', ') -%}
  {%- for x in items -%}{{ x }}{%- if not loop.last %}{{ sep }}{% endif -%}{%- endfor -%}
{%- endmacro -%}
{{ list_of(['a', 'b']) }} {{ '%s-%02d' % ('x', 7) }} {{ '{:>4}|{}'.format('ab', 3) }}
{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.role | upper }}{% endfor %}
{{ ([1, 2] + [3]) | join('-') }} {{ {'a': 1, 'é': [true, none, '<&>']} | tojson }}
{{ 'a,b'.split(',') | map('upper') | list }} {{ 'x' * 3 ~ 2 ** 3 ~ 7 % 4 }} {{ dict(a=1).a }}
{% set text %}block {{ messages | length }}{% endset %}{{ text | replace('o', '0') | indent(2) }}
{% filter upper %}quiet{% endfilter %} {{ messages | groupby('role') | length }}
{{ messages | map(attribute='role') | unique | sort | join(' ') }} {{ [3, 1] | sum }}
{{ '&lt;' | safe }} {{ '<b>' | e }} {{ missing | default('none') }} {{ messages[9] is defined }}
{{ namespace(x=1).x }} {{ range(3) | list }} {{ 'abc'[::-1] }} {{ 3.14159 | round(2) }}
{% call(x) list_of(['q']) %}{{ x }}{% endcall %}{{ ['a', 'b'] | batch(2, '-') | list }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1} | items | list }} {{ 'a b' | title | trim | length }}
"""
TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "tricks": TRICKS,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What <it> is & will be: “é”",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
ASK = {"role": "user", "content": "Is 1 < 2 && 'x'?  日本 😀"}
SAY = {"role": "assistant", "content": " Yes.\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"c": "é"}}}],
}
CHATS = {
    "one": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [SYSTEM, ASK, SAY, ASK],
    "thought": [ASK, {**SAY, "reasoning": "hm\n"}],
    "thinking": [ASK, {**SAY, "content": "<think>\nhm\n</think>\n\nYes."}, ASK],
    "tool": [ASK, CALL, {"role": "tool", "content": "20 °C"}, SAY, ASK],
}
ROLES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat")
    roles = {"pad": None, "bos": "<|bos|>", "eos": "<|eos|>"}
    Tokenizer.train("some text", "bytes", special_tokens=roles).save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(theirs, name, chat, tools, prompt):
    def ours():
        return render(
            TEMPLATES[name], CHATS[chat], tools=tools, add_generation_prompt=prompt, **ROLES
        )

    try:
        expected = theirs.apply_chat_template(
            CHATS[chat],
            tools=tools,
            chat_template=TEMPLATES[name],
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except Exception:
        with pytest.raises(DataError):
            ours()
    else:
        assert ours() == expected


def test_variables_reach_the_template():
    text = render(QWEN, [ASK], add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<think>\n\n</think>\n\n")
    assert render("{{ strftime_now('%Y') }}", [ASK]) == time.strftime("%Y")


def test_messages_are_left_as_they_are():
    messages = [{"role": "assistant", "content": "x", "reasoning": "y"}]
    render(QWEN, messages)
    assert messages == [{"role": "assistant", "content": "x", "reasoning": "y"}]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (SMOLLM2, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (MISTRAL, "</s>"),
        (QWEN, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        (
            "{% for m in messages %}{% if not loop.first %}<|end|>{% endif %}{{ m.content }}"
            "{% endfor %}",
            "<|end|>",
        ),
        ("{{ raise_exception('no') }}", None),
        ("{% broken", None),
    ],
)
def test_what_ends_a_turn_is_found_by_rendering(template, end):
    specials = ["<|im_end|>", "<|eot_id|>", "</s>", "<|end|>", "<|im_end|>\n"][:4]
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    assert end_of_turn(template, roles, specials) == end


def test_which_template():
    named = {"default": "d", "tool_use": "t", "rag": "r"}
    assert [pick(named), pick(named, tools=True), pick(named, "rag", True)] == ["d", "t", "r"]
    assert pick({"default": "d"}, tools=True) == "d"
    with pytest.raises(ConfigError, match="this tokenizer has none"):
        pick({})
    with pytest.raises(ConfigError, match="the names are rag"):
        pick({"rag": "r"})


@pytest.mark.parametrize(
    ("template", "messages", "error", "words"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", [ASK], DataError, "roles must altern"),
        ("{{ messages[0].name.first }}", [ASK], DataError, "lack"),
        ("{{ 'a' + messages[0].content }}", [{"role": "u", "content": None}], DataError, "fails"),
        ("{% if %}", [ASK], FileError, "line 1 of the chat template does not parse"),
        ("\n{{ x | nosuch }}", [ASK], FileError, "line 2.*nosuch"),
        ("x" * 60_000, [ASK], FileError, "60000 characters"),
        ("", [], DataError, "at least one"),
        ("", "hello", DataError, "at least one"),
        ("", ["hello"], DataError, "message 0 is 'hello'"),
        ("", [{"content": "x"}], DataError, "message 0"),
        ("", [{"role": "user", "content": object()}], DataError, "hold a object"),
        ("", [{"role": "user", "content": "x" * 9_000_000}], DataError, "more than 8000000"),
    ],
)
def test_errors_are_one_line(template, messages, error, words):
    with pytest.raises(error, match=words) as caught:
        render(template, messages)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('a') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ['{0.__class__}']|map('format', 1)|list and ''.join.__self__.__class__ }}",
    "{{ ('{0.__class__}'|safe).format(1) }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|groupby('__class__')|list }}",
    "{{ ['']|sort(attribute='__class__')|list }}",
    "{{ ['']|sum(attribute='__class__') }}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__init__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for a in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].content.encode() }}",
    "{{ lipsum.__globals__ }}",
    "{{ x.__init__.__globals__ }}",
    "{{ (5).to_bytes(4, 'big') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_way_out(template):
    with pytest.raises(PolyheadError) as caught:
        render(template, [ASK])
    assert "\n" not in str(caught.value)


LOOP = "{% for i in range(100000) %}"
GREEDY = {
    "loops": LOOP * 3 + "{% endfor %}" * 3,
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "filters": LOOP + "{{ range(100000)|map('string')|list|length }}{% endfor %}",
    "loop test": "{% for a in range(100000) if range(100000)|list|length < 0 %}{% endfor %}",
    "sorts": LOOP + "{{ range(100000)|sort|unique|list|length }}{% endfor %}",
    "comparisons": "{% set a = ['a'*1000]*7000 %}{% set b = ['a'*1000]*7000 %}"
    + LOOP
    + "{% if a == b %}{% endif %}{% endfor %}",
    "product": "{{ 'a' * 10000000000 }}",
    "list product": "{{ ([0] * 10000000000)|length }}",
    "power": "{{ 10 ** 1000000000 }}",
    "towers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent names": "{{ '%(a)s' * 1000000 % {'a': 'x' * 1000000} }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "nested format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "doubling ~": "{% set s = 'aaaa' %}" + "{% set s = s ~ s %}" * 60,
    "doubling +": "{% set s = 'aaaa' %}" + "{% set s = s + s %}" * 60,
    "doubling set": "{% set s %}aaaa{% endset %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "doubling list": "{% set s = [1] %}" + "{% set s = [s, s] %}" * 60 + "{{ s }}",
    "doubling dict": "{% set s = {} %}" + "{% set s = {'a': s, 'b': s} %}" * 60 + "{{ s|tojson }}",
    "doubling tuple": "{% set s = (1,) %}" + "{% set s = (s, s) %}" * 60 + "{{ s == s }}",
    "join": "{{ range(100000)|join('x' * 1000000) }}",
    "join method": "{{ ('x' * 1000000).join(['a'] * 100000) }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "indent": "{{ 'a\n'|indent(1000000000) }}",
    "round": "{{ 1.5|round(1000000000, 'ceil') }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list|length }}",
    "slice": "{{ [1]|slice(1000000000)|list|length }}",
    "tojson": "{{ [1]|tojson(indent=1000000000) }}",
    "separators": "{{ ([1] * 100000)|tojson(separators=('x' * 100000, 'y')) }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "split": LOOP + "{{ ('a ' * 3000000).split()|length }}{% endfor %}",
    "letters": "{{ ('a' * 8000000)|list|sort|length }}",
    "output": LOOP + "{{ 'a' * 100000 }}{% endfor %}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "nots": "{{ " + "not " * 10000 + "1 }}",
    "sum": "{{ 1" + "+1" * 20000 + " }}",
    "deep ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_templates_end_soon(name):
    start = time.thread_time()
    with pytest.raises(FileError, match="the chat template"):
        render(GREEDY[name], [ASK])
    assert time.thread_time() - start < 3  # about one second, on a machine with other work


WORDS = [
    "messages",
    "0",
    "1",
    "'a'",
    "x",
    "range(99)",
    "namespace(a=1)",
    "dict(a=1)",
    "loop",
    "none",
]
expressions = st.recursive(
    st.sampled_from(WORDS),
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from(["+", "*", "~", "%", "**", "==", "in", "and"]), e).map(
            " ".join
        ),
        st.tuples(
            e, st.sampled_from(["upper", "list", "length", "join", "tojson", "string", "e"])
        ).map("|".join),
        st.tuples(e, st.sampled_from(["__class__", "role", "items", "split"])).map(".".join),
        e.map("({})".format),
        e.map("[{0}, {0}]".format),
        e.map("{}()".format),
        e.map("{}[0]".format),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["{{{{ {} }}}}", "{{% for x in {} %}}", "{{% set x = {} %}}"]),
            expressions,
        ),
        max_size=6,
    )
)
def test_generated_templates_give_text_or_our_error(parts):
    source = "".join(form.format(e) for form, e in parts)
    source += "{% endfor %}" * source.count("{% for")
    assert "\n" not in _said(source)


def _said(source):
    try:
        return render(source, [ASK, SAY]).replace("\n", " ")
    except PolyheadError as error:
        return str(error)
