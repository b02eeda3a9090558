"""Encoder-decoders, and models that read images, over HTTP: what the library says."""

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
from tests.tasks.test_images import LABELS, clip, pictures, vision
from tests.tasks.test_translate import make as make_pair
from tests.tasks.tiny import wordpiece

import polyhead as ph
from polyhead.explain.alignment import alignment
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.images import Processor
from polyhead.images.sizes import Exactly
from polyhead.tasks.classify import ImageClassifier, ZeroShotClassifier

TEXTS = ["The loom weaves flowers.", "", "Was it good or bad?"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}[MASK]"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def seeing(folder: Path) -> None:
    """A LLaVA, whose image token is [MASK]."""
    tokenizer = wordpiece()
    sizes: dict[str, Any] = dict(d_model=16, d_ff=24, num_layers=2, num_heads=2)
    tower = dict(model_type="vit", image_size=24, patch_size=8, **sizes)
    decoder = dict(
        model_type="llama", vocab_size=tokenizer.vocab_size, max_seq_len=128, init_std=0.3, **sizes
    )
    (image_id,) = tokenizer.encode("[MASK]", add_special_tokens=False)
    ph.build("llava", text=decoder, vision=tower, image_token_id=image_id, seed=0).save(folder)
    tokenizer.save(folder, force=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    Processor(size=Exactly(24, 24), stem="CLIP").save(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    make_pair(folder / "t5", "t5")
    make_pair(folder / "pair", "transformer")
    vision(folder / "vit")
    clip(folder / "clip")
    seeing(folder / "llava")
    return folder


@pytest.fixture(scope="module")
def kinds(start: Start, models: Path) -> Server:
    return start(models=sorted(models.iterdir()))


@pytest.fixture(scope="module")
def ask(kinds: Server) -> Callable[..., Any]:
    def asked(path: str, status: int = 200, **body: Any) -> Any:
        answer = httpx.post(f"{kinds.url}{path}", json=body, timeout=60)
        assert answer.status_code == status, answer.text
        return answer.json()

    return asked


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"), 3)


def as_uri(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def test_what_they_are(kinds: Server) -> None:
    data = httpx.get(f"{kinds.url}/v1/models").json()["data"]
    assert {one["id"]: one["kind"] for one in data} == {
        "tiny": "decoder", "t5": "encoder-decoder", "pair": "encoder-decoder", "vit": "vision",
        "clip": "two towers", "llava": "image-text",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "pair"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_translations(name: str, num_beams: int, models: Path, ask: Callable[..., Any]) -> None:
    model, words = ph.load(models / name), ph.tokenizer(models / name)
    ours = ph.Translator(model, words)(TEXTS, num_beams=num_beams, max_new_tokens=9)
    said = ask(
        "/translate", model=name, input=TEXTS, num_beams=num_beams, max_tokens=9, alignment=True
    )
    assert [one["text"] for one in said["data"]] == [str(one) for one in ours]
    assert [one["score"] for one in said["data"]] == pytest.approx([one.score for one in ours])
    usage = said["usage"]
    assert usage["completion_tokens"] == sum(len(one.token_ids) for one in ours)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert said["data"][1]["alignment"] is None
    found, first = said["data"][0]["alignment"], ours[0]
    ids = torch.tensor([words.encode(TEXTS[0])])
    decoded = torch.tensor([[Seq2Seq(model, words).start, *first.token_ids[:-1]]])
    np.testing.assert_allclose(found["weights"], alignment(model, ids, decoded)[0], atol=1e-4)
    assert (len(found["target"]), len(found["source"])) == np.shape(found["weights"])
    assert len(found["links"]) == len(found["target"])
    plain = ask("/translate", model=name, input=TEXTS[0], prefix="say: ", max_tokens=5)
    with_prefix = ph.Translator(model, words, prefix="say: ")(TEXTS[:1], max_new_tokens=5)
    assert [one["text"] for one in plain["data"]] == with_prefix
    assert "alignment" not in plain["data"][0]


def test_completions_of_a_pair(kinds: Server, models: Path) -> None:
    client = openai.OpenAI(base_url=f"{kinds.url}/v1", api_key="none", max_retries=0)
    named: dict[str, Any] = dict(model="t5", prompt=TEXTS[0], max_tokens=7)
    whole = client.completions.create(**named, temperature=1, seed=4, n=3)
    assert len(whole.choices) == 3
    assert len({one.text for one in whole.choices}) > 1
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 21
    again = client.completions.create(**named, temperature=1, seed=4, n=3)
    assert [one.text for one in again.choices] == [one.text for one in whole.choices]
    model, words = ph.load(models / "t5"), ph.tokenizer(models / "t5")
    ours = ph.Translator(model, words)(TEXTS[:1], max_new_tokens=7)
    told = list(client.completions.create(**named, stream=True))
    assert "".join(chunk.choices[0].text for chunk in told) == ours[0]
    assert told[-1].choices[0].finish_reason in ("stop", "length")
    for wrong, words_of_it in (
        (dict(logprobs=1), "logprobs are told of decoders"),
        (dict(prompt="x " * 4000), "and the model takes"),
    ):
        if words_of_it == "and the model takes" and model.config.max_tokens is None:
            continue
        with pytest.raises(openai.BadRequestError, match=words_of_it):
            client.completions.create(**{**named, **wrong})
    with pytest.raises(openai.BadRequestError, match="does not chat"):
        client.chat.completions.create(model="t5", messages=[{"role": "user", "content": "x"}])


def test_ids_of_a_pair(models: Path, ask: Callable[..., Any]) -> None:
    ids = ask("/tokenize", model="t5", prompt=TEXTS[0])["tokens"]
    assert ids == ph.tokenizer(models / "t5").encode(TEXTS[0])
    assert TEXTS[0].split()[1] in ask("/detokenize", model="t5", tokens=ids)["prompt"]
    told = ask("/detokenize", 400, model="t5", tokens=[9999999])
    assert "outside the model's vocabulary" in told["error"]["message"]


def test_images_are_classed(models: Path, images: list[str], ask: Callable[..., Any]) -> None:
    model, processor = ph.load(models / "vit"), Processor.load(models / "vit")
    said = ask("/classify", model="vit", images=[as_uri(path) for path in images])
    for told, ours in zip(said["data"], ImageClassifier(model, processor)(images), strict=True):
        assert told["label"] == ours.label
        assert told["scores"] == pytest.approx(dict(ours.scores), abs=1e-5)
    model, processor = ph.load(models / "clip"), Processor.load(models / "clip")
    zero = ZeroShotClassifier(model, ph.tokenizer(models / "clip"), processor)
    own = zero(images, LABELS, template="see {}")
    uris = [as_uri(path) for path in images]
    said = ask("/classify", model="clip", images=uris, labels=LABELS, template="see {}")
    for told, ours in zip(said["data"], own, strict=True):
        assert told["scores"] == pytest.approx(dict(ours.scores), abs=1e-5)


def test_vectors_of_texts_and_images(
    models: Path, images: list[str], ask: Callable[..., Any]
) -> None:
    uris = [as_uri(path) for path in images]
    said = ask("/v1/embeddings", model="clip", input=list(LABELS), images=uris)
    vectors = torch.tensor([one["embedding"] for one in said["data"]])
    model, processor = ph.load(models / "clip"), Processor.load(models / "clip")
    rows = ph.tokenizer(models / "clip")(list(LABELS))
    with torch.no_grad():
        texts = model.encode_text(rows.input_ids, rows.attention_mask)
        seen = model.encode_image(processor(images))
    torch.testing.assert_close(vectors, torch.cat([texts, seen]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_about_images(
    stream: bool, kinds: Server, models: Path, images: list[str]
) -> None:
    model, words = ph.load(models / "llava"), ph.tokenizer(models / "llava")
    processor = Processor.load(models / "llava")
    ours = ph.TextGenerator(model, words).generate(
        [words.encode("user:was it good [MASK][MASK]", add_special_tokens=False)],
        ph.GenerationConfig(temperature=0, max_new_tokens=12),
        images=[processor(images[:2])],
    )
    client = openai.OpenAI(base_url=f"{kinds.url}/v1", api_key="none")
    content: list[Any] = [{"type": "text", "text": "was it good "}]
    content += [{"type": "image_url", "image_url": {"url": as_uri(path)}} for path in images[:2]]
    found = client.chat.completions.create(
        model="llava", messages=[{"role": "user", "content": content}], temperature=0,
        max_tokens=12, stream=stream,
    )  # fmt: skip
    told = (
        "".join(chunk.choices[0].delta.content or "" for chunk in found)
        if stream
        else found.choices[0].message.content
    )
    assert told == ours[0]
    alone = client.chat.completions.create(
        model="llava", messages=[{"role": "user", "content": "was it good"}], max_tokens=3
    )
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == len(
        words.encode("user:was it good", add_special_tokens=False)
    )


PICTURE = "data:image/png;base64," + base64.b64encode(b"no picture").decode()


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/classify", {"model": "vit", "input": "x"}, "reads images, and input is text"),
        ("/classify", {"model": "vit"}, "send input, or images"),
        ("/classify", {"model": "vit", "images": ["http://a/b.png"]}, "sent as a data URI"),
        ("/classify", {"model": "vit", "images": ["data:image/png;base64,%%"]}, "base64 is broken"),
        ("/classify", {"model": "vit", "images": [PICTURE]}, "no image"),
        ("/classify", {"model": "vit", "images": ["/etc/passwd"]}, "sent as a data URI"),
        ("/classify", {"model": "vit", "images": [PICTURE], "labels": ["a", "b"]}, "has its own"),
        ("/classify", {"model": "clip", "images": [PICTURE]}, "two or more labels"),
        ("/translate", {"model": "vit", "input": "x"}, "ask it for /classify"),
        ("/translate", {"model": "tiny", "input": "x"}, "writes and does not read"),
        ("/translate", {"model": "t5", "input": "x", "num_beams": 99}, "num_beams"),
        ("/embeddings", {"model": "t5", "input": "x"}, "Not Found"),
    ],
)
def test_what_is_refused(path: str, body: dict[str, Any], told: str, kinds: Server) -> None:
    answer = httpx.post(f"{kinds.url}{path}", json=body)
    assert answer.status_code in (400, 404)
    assert told in answer.json()["error"]["message"]
    assert "/tmp" not in answer.text


def test_a_model_of_texts_is_shown_nothing(kinds: Server, images: list[str]) -> None:
    content = [{"type": "image_url", "image_url": {"url": as_uri(images[0])}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{kinds.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "reads no images" in answer.json()["error"]["message"]
