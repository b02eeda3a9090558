"""Requests for models that another server holds go on to it."""

import os
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.serve.conftest import Server, Start

import polyhead as ph
from polyhead.serve.upstream import read_upstreams

ASKED: dict[str, Any] = dict(messages=[{"role": "user", "content": "once"}], max_tokens=9)


@pytest.fixture(scope="module")
def both(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Server, Server, openai.OpenAI]:
    """One that holds a model and wants a key, and one in front that has that key."""
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "keys").write_text("front sesame\n")
    held = start("--keys", str(folder / "keys"))
    routes = folder / "upstreams.toml"
    routes.write_text(
        f'[[upstream]]\nname = "far"\nmodel = "tiny"\nurl = "{held.url}/v1/"\nkey_env = "FAR_KEY"\n'
        '[[upstream]]\nname = "gone"\nurl = "http://127.0.0.1:9/v1"\n'
        f'[[upstream]]\nname = "wrong"\nurl = "{held.url}/v1"\nkey_env = "FAR_KEY"\n'
    )
    os.environ["FAR_KEY"] = "sesame"
    try:
        front = start("--upstreams", str(routes))
    finally:
        del os.environ["FAR_KEY"]
    client = openai.OpenAI(base_url=f"{front.url}/v1", api_key="mine", max_retries=0)
    return held, front, client


def chat(client: openai.OpenAI, model: str, stream: bool = False) -> str:
    found: Any = client.chat.completions.create(model=model, **ASKED, temperature=0, stream=stream)
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)
    return found.choices[0].message.content


def test_they_answer_as_those_that_are_held(both: tuple[Server, Server, openai.OpenAI]) -> None:
    held, _, client = both
    assert [model.id for model in client.models.list()] == ["tiny", "far", "gone", "wrong"]
    here = chat(client, "tiny")
    assert chat(client, "far") == chat(client, "far", stream=True) == here
    assert chat(client, "tiny", stream=True) == here
    said = client.completions.create(model="far", prompt="once", max_tokens=4, temperature=0)
    assert said.model == "tiny"
    assert said.usage is not None
    assert client.responses.create(model="far", input="once", max_output_tokens=3).output_text
    paths = [line for line in held.log.read_text().splitlines() if '"key": "front"' in line]
    assert len(paths) == 4


def test_what_goes_wrong_there_is_told(both: tuple[Server, Server, openai.OpenAI]) -> None:
    _, front, client = both
    with pytest.raises(openai.InternalServerError, match="that holds gone does not answer"):
        chat(client, "gone")
    with pytest.raises(openai.NotFoundError, match="there is no model 'wrong'"):
        chat(client, "wrong")
    with pytest.raises(openai.BadRequestError, match="n: "):
        client.chat.completions.create(model="far", **ASKED, n=99)
    broken = httpx.post(f"{front.url}/v1/chat/completions", content=b"{")
    assert broken.status_code == 400
    assert httpx.post(f"{front.url}/v1/completions", content=b"[]").status_code == 400


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[upstream]]\nname = 1", "has to say name and url"),
        ('[[upstream]]\nname = "x"\nurl = "u"\nkey = "k"', "see key"),
        ('[[upstream]]\nname = "x"\nurl = "u"\nkey_env = "NOWHERE"', "wants a key in $NOWHERE"),
        ("", "names no [[upstream]]"),
        ("[[", "cannot read the upstreams"),
    ],
)
def test_files_that_name_none(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "u.toml").write_text(text)
    with pytest.raises(ph.FileError) as error:
        read_upstreams(tmp_path / "u.toml")
    assert told in str(error.value)
