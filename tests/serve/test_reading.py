"""Models that read, over HTTP: what the library says, and sentence-transformers'."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from tests.serve.conftest import Server, Start
from tests.tasks.tiny import make

import polyhead as ph

TEXTS = ["Ada lives in London", "a cat", "", "x " * 300]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    make(folder / "mood", "classify", labels=("bad", "good"))
    make(folder / "names", "tag", labels=("O", "B-PER", "I-PER"))
    make(folder / "squad", "answer")
    make(folder / "bert", "lm")
    make(folder / "vectors", "none")
    return folder


@pytest.fixture(scope="module")
def reading(start: Start, models: Path) -> Server:
    return start(models=sorted(models.iterdir()))


@pytest.fixture(scope="module")
def ask(reading: Server) -> Callable[..., Any]:
    def asked(path: str, **body: Any) -> Any:
        answer = httpx.post(f"{reading.url}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return asked


def opened(models: Path, name: str) -> tuple[Any, Any]:
    return ph.load(models / name), ph.tokenizer(models / name)


def test_several_models_are_told_apart(reading: Server) -> None:
    client = openai.OpenAI(base_url=f"{reading.url}/v1", api_key="none")
    kinds = {model.id: getattr(model, "kind", "") for model in client.models.list().data}
    assert kinds == {
        "tiny": "decoder",
        **dict.fromkeys(["bert", "mood", "names", "squad", "vectors"], "encoder"),
    }
    for body, words in (({"model": "mood", "prompt": "x"}, "reads and does not write"),):
        answer = httpx.post(f"{reading.url}/v1/completions", json=body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    answer = httpx.post(f"{reading.url}/fill", json={"model": "tiny", "input": "x"})
    assert "writes and does not read" in answer.json()["error"]["message"]
    answer = httpx.post(f"{reading.url}/tag", json={"model": "mood", "input": "x"})
    assert answer.status_code == 400
    assert "tag" in answer.json()["error"]["message"]


def test_embeddings(reading: Server, models: Path, ask: Callable[..., Any]) -> None:
    ours = ph.embed(*opened(models, "vectors"), TEXTS)
    assert isinstance(ours, torch.Tensor)
    client = openai.OpenAI(base_url=f"{reading.url}/v1", api_key="none")
    found = client.embeddings.create(model="vectors", input=TEXTS)  # asks for base64
    assert [one.index for one in found.data] == [0, 1, 2, 3]
    np.testing.assert_allclose([one.embedding for one in found.data], ours.numpy(), atol=1e-5)
    plain = ask("/v1/embeddings", model="vectors", input=TEXTS[0], dimensions=8)
    np.testing.assert_allclose(np.linalg.norm(plain["data"][0]["embedding"]), 1, atol=1e-5)
    assert len(plain["data"][0]["embedding"]) == 8
    coded = ask("/v1/embeddings", model="vectors", input=TEXTS[0], encoding_format="base64")
    row = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(row, ours[0], atol=1e-5)
    assert plain["usage"]["prompt_tokens"] > 0


def test_rerank_by_vectors_and_by_a_head(models: Path, ask: Callable[..., Any]) -> None:
    documents = ["a dog", "a cat", "London"]
    found = ask("/v1/rerank", model="vectors", query="a cat", documents=documents, top_n=2)
    assert next(one["index"] for one in found["results"]) == 1
    assert found["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-4)
    assert found["results"][0]["document"] == {"text": "a cat"}
    assert len(found["results"]) == 2
    by_head = ask(
        "/v1/rerank", model="mood", query="q", documents=documents, return_documents=False
    )
    ours = ph.Classifier(*opened(models, "mood"))(["q"] * 3, documents)
    scores = {one["index"]: one["relevance_score"] for one in by_head["results"]}
    assert scores == pytest.approx({i: one.score for i, one in enumerate(ours)}, abs=1e-5)


def test_the_tasks(models: Path, ask: Callable[..., Any]) -> None:
    (one, _) = ask("/classify", model="mood", input=["so good", "so bad"])["data"]
    ours = ph.Classifier(*opened(models, "mood"))("so good")[0]
    assert (one["label"], one["score"]) == (ours.label, pytest.approx(ours.score, abs=1e-5))
    pair = ask("/classify", model="mood", input="a", pairs=["b"])["data"][0]
    assert pair["scores"] == pytest.approx(
        dict(ph.Classifier(*opened(models, "mood"))("a", "b")[0].scores), abs=1e-5
    )
    tagged = ask("/tag", model="names", input=TEXTS[0])["data"][0]["entities"]
    assert [each["text"] for each in tagged] == [
        each.text for each in ph.Tagger(*opened(models, "names"))(TEXTS[0])[0]
    ]
    mask = ph.tokenizer(models / "bert").named_special_tokens["mask_token"]
    filled = ask("/fill", model="bert", input=f"a {mask} cat", top_k=2)["data"][0]["masks"]
    filler = ph.Filler(*opened(models, "bert"))
    assert [each["token"] for each in filled[0]] == [
        each.token for each in filler(f"a {mask} cat", top_k=2)[0][0]
    ]
    said: dict[str, Any] = {"question": "who?", "context": "Ada lives in London."}
    answers = ask("/answer", model="squad", top_k=2, **said)["data"][0]["answers"]
    theirs = ph.Answerer(*opened(models, "squad"))("who?", said["context"], top_k=2)[0]
    assert [each["text"] for each in answers] == [each.text for each in theirs]


def test_minilm_gives_sentence_transformers_numbers(start: Start, minilm: Path) -> None:
    theirs = pytest.importorskip("sentence_transformers")
    texts = ["A cat sat down.", "Stocks fell.", "Über die Brücke", "word " * 400]
    wanted = theirs.SentenceTransformer(str(minilm), device="cpu").encode(texts)
    server = start(models=[f"minilm={minilm}"])
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = client.embeddings.create(model="minilm", input=texts).data
    np.testing.assert_allclose([one.embedding for one in found], wanted, atol=1e-5)
