"""`/v1/responses` through the openai client, and `/explain`."""

import base64
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Server, Start, until
from tests.tasks.test_images import clip, pictures, vision
from tests.tasks.test_translate import make as make_pair
from tests.tasks.tiny import make

import polyhead as ph
from polyhead.tasks.inside import inside

TURNS: list[Any] = [
    {"role": "user", "content": "once"},
    {"role": "assistant", "content": [{"type": "output_text", "text": "upon"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "a time"}]},
]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chatted(client: openai.OpenAI, **named: Any) -> str:
    found = client.chat.completions.create(model="tiny", temperature=0, max_tokens=9, **named)
    return found.choices[0].message.content or ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("instructions", [None, "Be kind."])
@pytest.mark.parametrize("given", ["once", TURNS], ids=["text", "turns"])
def test_they_say_what_chats_say(
    given: Any, instructions: str | None, stream: bool, client: openai.OpenAI
) -> None:
    asked: dict[str, Any] = dict(model="tiny", input=given, temperature=0, max_output_tokens=9)
    if instructions:
        asked["instructions"] = instructions
    messages: list[Any] = [{"role": "system", "content": instructions}] if instructions else []
    messages += [{"role": "user", "content": "once"}] if given == "once" else [
        {"role": "user", "content": "once"}, {"role": "assistant", "content": "upon"},
        {"role": "user", "content": "a time"},
    ]  # fmt: skip
    wanted = chatted(client, messages=messages)
    if stream:
        events = list(client.responses.create(**asked, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(pieces) == wanted
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] in ("response.completed", "response.incomplete")
        found = events[-1].response
    else:
        found = client.responses.create(**asked)
    assert found.output_text == wanted
    assert found.status == ("incomplete" if found.usage.output_tokens == 9 else "completed")
    if found.status == "incomplete":
        assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens


def test_an_answer_goes_on_while_nobody_listens(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = dict(model="tiny", input="once", temperature=0, max_output_tokens=400)
    wanted = client.responses.create(**asked).output_text
    first, number, seen = "", -1, ""
    for event in client.responses.create(**asked, background=True, stream=True):
        number = event.sequence_number
        if event.type == "response.created":
            first = event.response.id
        if event.type == "response.output_text.delta":
            seen += event.delta
            break  # and hang up
    for event in client.responses.retrieve(first, stream=True, starting_after=number):
        assert event.sequence_number == number + 1
        number += 1
        if event.type == "response.output_text.delta":
            seen += event.delta
    assert seen == wanted
    again = client.responses.retrieve(first)
    assert (again.output_text, again.status) in [(wanted, "incomplete"), (wanted, "completed")]
    assert client.responses.cancel(first).status == again.status
    with pytest.raises(openai.NotFoundError, match="there is no answer"):
        client.responses.retrieve("resp_none")


def test_an_answer_in_the_background_is_ended(server: Server, client: openai.OpenAI) -> None:
    begun = client.responses.create(
        model="tiny", input="once", max_output_tokens=30_000, temperature=0, background=True
    )
    assert begun.status == "in_progress"
    until(lambda: client.responses.retrieve(begun.id).output_text)
    assert client.responses.cancel(begun.id).status == "cancelled"
    held = 'vllm:num_requests_running{model_name="tiny"} 0.0'
    until(lambda: held in httpx.get(f"{server.url}/metrics").text)


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    form: Any = {"type": "json_schema", "name": "one", "schema": schema, "strict": True}
    found = client.responses.create(
        model="tiny", input="x", text={"format": form}, max_output_tokens=400
    )
    assert found.output_text.replace(" ", "").strip() in ('{"a":1}', '{"a":2}') or "a" in (
        found.output_text
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"store": True}, "only background answers are stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input"),
        (
            {"input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": "http://a/b.png"}]}]},
            "data URI",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], told: str, server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/responses", json={"model": "tiny", "input": "x"} | changes
    )
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


def test_bytes_of_part_of_a_letter(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, max_tokens=40,
        temperature=1.5, seed=3,
    )  # fmt: skip
    choice = found.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert any(token.token == "\N{REPLACEMENT CHARACTER}" for token in tokens)
    whole = b"".join(bytes(token.bytes or []) for token in tokens)
    assert whole.decode("utf-8", "replace").startswith((choice.message.content or "")[:5])
    assert all(len(token.bytes or []) == 1 for token in tokens if len(token.token) == 1)


@pytest.fixture(scope="module")
def seen(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("seen")
    make(folder / "mood", "classify", labels=("bad", "good"))
    make_pair(folder / "t5", "t5")
    vision(folder / "vit")
    clip(folder / "clip")
    return start(models=sorted(folder.iterdir()))


def test_what_heads_look_at(seen: Server, folder: Path, tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, 1)
    image = "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
    asked: dict[str, dict[str, Any]] = {
        "tiny": {"text": "once upon once upon"},
        "mood": {"text": "good", "second": "bad loom"},
        "t5": {"text": "the quick fox"},
        "vit": {"image": image},
        "clip": {"text": "a cat", "image": image},
    }
    for name, body in asked.items():
        answer = httpx.post(f"{seen.url}/explain", json={"model": name, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["page"]["stacks"], name
        assert found["facts"]["model"].endswith("parameters")
    model, words = ph.load(folder), ph.tokenizer(folder)
    ours = inside(model, words, "once upon once upon", title="tiny").data()
    told = httpx.post(f"{seen.url}/explain", json={"model": "tiny", **asked["tiny"]}).json()
    assert told["page"]["sides"] == [{"tokens": side["tokens"]} for side in ours["sides"]]
    assert [s["layers"] for s in told["page"]["stacks"]] == [s["layers"] for s in ours["stacks"]]
    page = httpx.post(
        f"{seen.url}/explain", json={"model": "tiny", "format": "html", **asked["tiny"]}
    )
    assert page.headers["content-type"].startswith("text/html")
    assert "polyhead-inside" in page.text


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"model": "tiny"}, "give it a text"),
        (
            {"model": "tiny", "text": "x y z", "layers": "nowhere"},
            "no attention is called 'nowhere'",
        ),
        ({"model": "tiny", "text": "x y", "second": "z"}, "leave the second out"),
        ({"model": "vit", "text": "x"}, "leave the text out"),
        ({"model": "tiny", "text": "x", "max_tokens": 99999}, "max_tokens"),
    ],
)
def test_what_cannot_be_looked_at(body: dict[str, Any], told: str, seen: Server) -> None:
    answer = httpx.post(f"{seen.url}/explain", json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
