"""What models are asked besides text that goes on: `/v1/embeddings`, `/v1/rerank`, and tasks."""

import base64
import uuid
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from pydantic import Field, model_validator

from polyhead.serve.backend import Backend
from polyhead.serve.protocol import Body, Image, Name, Text

Texts = Annotated[list[Text], Field(min_length=1, max_length=2048)]
Images = Annotated[list[Image], Field(min_length=1, max_length=64)]
Few = Annotated[int, Field(ge=1, le=100)]


class _ReadsImages(Body):
    """Texts, or images as data URIs."""

    model: Name
    input: Text | Texts | None = None
    images: Images | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.input is None and self.images is None:
            raise ValueError("send input, or images")
        return self

    def read(self) -> dict[str, Any]:
        """What there is to read: texts, and the bytes of images."""
        texts = [] if self.input is None else _listed(self.input)
        return {"texts": texts, "images": self.images or []}


class Embeddings(_ReadsImages):
    """`/v1/embeddings`."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, lt=2**24)
    user: Annotated[str, Field(max_length=512)] | None = None


class Rerank(Body):
    """`/v1/rerank`: documents by how well they suit a query."""

    model: Name
    query: Text
    documents: Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class Classify(_ReadsImages):
    """`/classify`: texts, pairs of texts, or images, whose classes a CLIP is told as labels."""

    pairs: Texts | None = None
    labels: Annotated[list[Text], Field(min_length=2, max_length=1000)] | None = None
    template: Annotated[str, Field(max_length=1000)] | None = None


class Translate(Body):
    """`/translate`: texts rewritten by an encoder-decoder. alignment: what came of what."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    prefix: Annotated[str, Field(max_length=1000)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    alignment: bool = False

    def settings(self) -> dict[str, Any]:
        """Fields of GenerationConfig."""
        said = {
            "num_beams": self.num_beams, "max_new_tokens": self.max_tokens,
            "length_penalty": self.length_penalty,
        }  # fmt: skip
        return {name: value for name, value in said.items() if value is not None}


class Tag(Body):
    """`/tag`."""

    model: Name
    input: Text | Texts


class Fill(Body):
    """`/fill`: texts with masks."""

    model: Name
    input: Text | Texts
    top_k: Few = 5


class Answer(Body):
    """`/answer`: questions on one context."""

    model: Name
    question: Text | Texts
    context: Text
    top_k: Few = 1


class Explain(Body):
    """`/explain`: what every head looks at. layers: a part of their names, or a pattern."""

    model: Name
    text: Annotated[str, Field(max_length=100_000)] | None = None
    second: Annotated[str, Field(max_length=100_000)] | None = None
    image: Image | None = None
    layers: Annotated[str, Field(min_length=1, max_length=256)] = "*"
    max_tokens: Annotated[int, Field(ge=2, le=1024)] = 256
    format: Literal["json", "html"] = "json"

    def given(self) -> dict[str, Any]:
        """What the worker reads."""
        return self.model_dump(exclude={"format", "model"}) | {
            "title": self.model, "html": self.format == "html"
        }  # fmt: skip


def add(app: FastAPI, backend: Backend) -> None:
    """The routes."""

    @app.post("/v1/embeddings")
    async def embeddings(body: Embeddings) -> dict[str, Any]:
        """A vector for each text."""
        given = {**body.read(), "dimensions": body.dimensions}
        found = await backend.result(body.model, "embed", given)
        data = [
            {"object": "embedding", "index": i, "embedding": _written(row, body.encoding_format)}
            for i, row in enumerate(found["vectors"])
        ]
        return {"object": "list", "model": body.model, "data": data, "usage": _usage(found)}

    @app.post("/v1/rerank")
    async def rerank(body: Rerank) -> dict[str, Any]:
        """The best first."""
        given = {"query": body.query, "documents": body.documents}
        found = await backend.result(body.model, "rerank", given)
        order = sorted(range(len(body.documents)), key=lambda i: -found["scores"][i])
        results = [
            {"index": i, "relevance_score": found["scores"][i]}
            | ({"document": {"text": body.documents[i]}} if body.return_documents else {})
            for i in order[: body.top_n]
        ]
        head = {"id": f"rerank-{uuid.uuid4().hex}", "model": body.model}
        return {**head, "results": results, "usage": _usage(found)}

    async def done(model: str, what: str, given: dict[str, Any]) -> dict[str, Any]:
        found = await backend.result(model, what, given)
        data = [{"index": i, **one} for i, one in enumerate(found["data"])]
        return {"object": "list", "model": model, "data": data, "usage": _usage(found)}

    @app.post("/classify")
    async def classify(body: Classify) -> dict[str, Any]:
        """The classes of texts or images, with the probability of each."""
        given = {
            **body.read(), "pairs": body.pairs, "labels": body.labels, "template": body.template
        }  # fmt: skip
        return await done(body.model, "classify", given)

    @app.post("/translate")
    async def translate(body: Translate) -> dict[str, Any]:
        """What an encoder-decoder writes of each text."""
        given = {
            "texts": _listed(body.input), "prefix": body.prefix, "settings": body.settings(),
            "alignment": body.alignment,
        }  # fmt: skip
        return await done(body.model, "translate", given)

    @app.post("/explain")
    async def explain(body: Explain) -> Any:
        """What every head looks at, which are worth a look, and what each layer would answer."""
        found = await backend.result(body.model, "explain", body.given())
        if body.format == "html":
            return HTMLResponse(found["html"])
        return {"model": body.model, **found}

    @app.post("/tag")
    async def tag(body: Tag) -> dict[str, Any]:
        """Words that the model has tags for, with their places."""
        return await done(body.model, "tag", {"texts": _listed(body.input)})

    @app.post("/fill")
    async def fill(body: Fill) -> dict[str, Any]:
        """What may stand behind each mask of each text."""
        given = {"texts": _listed(body.input), "top_k": body.top_k}
        return await done(body.model, "fill", given)

    @app.post("/answer")
    async def answer(body: Answer) -> dict[str, Any]:
        """Where a context answers questions."""
        given = {"questions": _listed(body.question), "context": body.context, "top_k": body.top_k}
        return await done(body.model, "answer", given)


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _written(row: Any, form: str) -> Any:
    return row.tolist() if form == "float" else base64.b64encode(row.tobytes()).decode()


def _usage(found: Any) -> dict[str, int]:
    read, written = found["tokens"], found.get("written", 0)
    told = {"prompt_tokens": read, "total_tokens": read + written}
    return told | ({"completion_tokens": written} if written else {})
