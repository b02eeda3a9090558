"""OpenAI's own client speaks to a running server."""

from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.conftest import Server

import polyhead as ph

ASKED: list[Any] = [{"role": "user", "content": "once upon"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def writer(folder: Path) -> ph.TextGenerator:
    return ph.TextGenerator(ph.load(folder), ph.tokenizer(folder))


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("none")
    assert found.value.code == "model_not_found"


def test_a_completion_is_what_the_library_writes(
    client: openai.OpenAI, writer: ph.TextGenerator
) -> None:
    prompts = ["once upon a time", "there was"]
    config = ph.GenerationConfig(max_new_tokens=20, temperature=0)
    ours = [str(one) for one in writer.generate(prompts, config)]
    said: dict[str, Any] = dict(model="tiny", max_tokens=20, temperature=0)
    whole = client.completions.create(prompt=prompts, **said)
    assert [choice.text for choice in whole.choices] == ours
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == sum(map(len, prompts))
    ids = [writer.tokenizer.encode(prompt) for prompt in prompts]
    assert client.completions.create(prompt=ids, **said).choices[1].text == ours[1]
    pieces = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **said):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == ours


def test_seeds_give_the_same_again(client: openai.OpenAI, writer: ph.TextGenerator) -> None:
    said: dict[str, Any] = dict(model="tiny", prompt="once", max_tokens=12, n=3, seed=7)
    first = [choice.text for choice in client.completions.create(**said).choices]
    again = [choice.text for choice in client.completions.create(**said).choices]
    assert first == again
    assert len(set(first)) == 3
    config = ph.GenerationConfig(max_new_tokens=12, seed=7, num_return_sequences=3)
    (ours,) = writer.generate_all(["once"], config)
    assert first == [str(one) for one in ours]


def test_a_conversation(client: openai.OpenAI, writer: ph.TextGenerator) -> None:
    said: dict[str, Any] = dict(model="tiny", messages=ASKED, temperature=0, max_tokens=16)
    text = writer.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)
    config = ph.GenerationConfig(max_new_tokens=16, temperature=0)
    ours = str(writer.generate(text, config))
    whole = client.chat.completions.create(**said)
    assert whole.choices[0].message.content == ours
    assert whole.choices[0].message.role == "assistant"
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(stream=True, stream_options=options, **said))
    spoken = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert spoken[0].role == "assistant"
    assert "".join(delta.content or "" for delta in spoken) == ours
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    stop = ours[6:9]
    short = client.chat.completions.create(stop=stop, **said).choices[0]
    assert (short.message.content, short.finish_reason) == (ours[: ours.index(stop)], "stop")


def test_logprobs_are_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    said: dict[str, Any] = dict(
        model="tiny", messages=ASKED, temperature=0, max_tokens=9, logprobs=True, top_logprobs=3
    )
    logprobs = client.chat.completions.create(**said).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 9
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(stream=True, **said):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content or []
    assert [one.logprob for one in streamed] == [one.logprob for one in logprobs.content]
    old = client.completions.create(model="tiny", prompt="once", max_tokens=4, logprobs=2)
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.token_logprobs or []) == 4


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=400, response_format=wanted, seed=1
    ).choices[0]
    assert answer.finish_reason == "stop"
    assert set(__import__("json").loads(answer.message.content or "")) == {"a"}


@pytest.mark.parametrize(
    ("said", "param", "words"),
    [
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": -2}, "max_tokens", "greater than"),
        ({"extra_body": {"colour": "red"}}, "colour", "not permitted"),
        ({"logit_bias": {"9999": 1}}, None, "9999"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0", "content is missing"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role", "'tool'"),
        ({"top_logprobs": 3}, None, "logprobs"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ],
)
def test_bad_requests_name_the_field(
    client: openai.OpenAI, said: dict[str, Any], param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**{"model": "tiny", "messages": ASKED} | said)
    assert words in found.value.message
    assert param is None or (found.value.param or "").startswith(param)
    assert found.value.type == "invalid_request_error"
    assert "/" not in found.value.message.replace("/v1", "")
