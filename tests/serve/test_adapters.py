"""Adapters that are loaded and dropped while the server runs."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.serve.conftest import Server, Start, until

import polyhead as ph
from polyhead.adapt.adapters import add_adapter
from polyhead.adapt.lora import LoraConfig
from polyhead.adapt.peft import load_adapter, save_adapter

NAMES = ("formal", "curt")


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        model = ph.load(folder)
        add_adapter(model, LoraConfig(rank=2, trained=("norm",) if seed else ()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        save_adapter(model, root / name)
    shutil.copytree(folder, root / "whole")
    return root


@pytest.fixture(scope="module")
def server(start: Start, adapters: Path) -> Server:
    return start("--adapters", str(adapters))


def said(server: Server, path: str, **body: Any) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    return answer.json() | {"status": answer.status_code}


def text(server: Server, model: str) -> Any:
    found = said(
        server, "/v1/completions", model=model, prompt="once", max_tokens=12, temperature=0
    )
    return found["choices"][0]["text"] if found["status"] == 200 else found["error"]["code"]


def ours(folder: Path, adapter: Path | None) -> str:
    model = ph.load(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    config = ph.GenerationConfig(temperature=0, max_new_tokens=12)
    return str(ph.TextGenerator(model, ph.tokenizer(folder)).generate(["once"], config)[0])


def models(server: Server) -> dict[str, Any]:
    return {each["id"]: each for each in httpx.get(f"{server.url}/v1/models").json()["data"]}


def test_they_come_and_go(server: Server, folder: Path, adapters: Path) -> None:
    assert text(server, "formal") == "model_not_found"
    for name in NAMES:
        assert said(server, "/v1/load_lora_adapter", lora_name=name)["parent"] == "tiny"
    wanted = {name: ours(folder, adapters / name) for name in NAMES} | {"tiny": ours(folder, None)}
    assert len(set(wanted.values())) == 3
    assert {name: text(server, name) for name in wanted} == wanted
    held = models(server)
    assert held["formal"]["weight_bytes"] < held["tiny"]["weight_bytes"] / 2
    again = said(server, "/v1/load_lora_adapter", lora_name="formal")
    assert (again["status"], again["error"]["param"]) == (400, "lora_name")
    # Those of a worker that is lost come back with it.
    os.kill(*server.workers(), signal.SIGKILL)
    until(lambda: "polyhead:worker_restarts_total 1.0" in httpx.get(f"{server.url}/metrics").text)
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    assert {name: text(server, name) for name in wanted} == wanted
    for name in NAMES:
        told = said(server, "/v1/unload_lora_adapter", lora_name=name)
        assert told["deleted"] is True
        assert text(server, name) == "model_not_found"
    assert text(server, "tiny") == wanted["tiny"]
    assert list(models(server)) == ["tiny"]


def test_by_another_name(server: Server, folder: Path, adapters: Path) -> None:
    named = dict(lora_name="other", lora_path="curt", model="tiny")
    assert said(server, "/v1/load_lora_adapter", **named)["id"] == "other"
    assert text(server, "other") == ours(folder, adapters / "curt")
    assert said(server, "/v1/unload_lora_adapter", lora_name="other")["deleted"] is True


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"lora_name": "x"}, 404, "there is no adapter 'x'; there is curt, formal"),
        ({"lora_name": "x", "lora_path": "../served/tiny"}, 404, "there is no adapter"),
        ({"lora_name": "x", "lora_path": "/etc"}, 404, "there is no adapter"),
        ({"lora_name": "x", "lora_path": "whole"}, 404, "there is no adapter 'whole'"),
        ({"lora_name": "formal", "model": "none"}, 404, "there is no model 'none'"),
        ({"lora_name": "a/b"}, 400, "lora_name"),
        ({}, 400, "lora_name"),
    ],
)
def test_what_is_refused(body: dict[str, Any], status: int, told: str, server: Server) -> None:
    found = said(server, "/v1/load_lora_adapter", **body)
    assert (found["status"], told in found["error"]["message"]) == (status, True)
    dropped = said(server, "/v1/unload_lora_adapter", lora_name="tiny")
    assert dropped["status"] == 400
    assert "is no adapter" in dropped["error"]["message"]


def test_none_is_loaded_that_was_not_allowed(start: Start) -> None:
    found = said(start(), "/v1/load_lora_adapter", lora_name="formal")
    assert found["status"] == 400
    assert "started without --adapters" in found["error"]["message"]
