"""What models are asked that read and do not write: `/v1/embeddings`, `/v1/rerank`, and tasks."""

import base64
import uuid
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import Field

from polyhead.serve.backend import Backend
from polyhead.serve.protocol import Body, Name, Text

Texts = Annotated[list[Text], Field(min_length=1, max_length=2048)]
Few = Annotated[int, Field(ge=1, le=100)]


class Embeddings(Body):
    """`/v1/embeddings`."""

    model: Name
    input: Text | Texts
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


class Classify(Body):
    """`/classify`: texts, or pairs of texts."""

    model: Name
    input: Text | Texts
    pairs: Texts | None = None


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


def add(app: FastAPI, backend: Backend) -> None:
    """The routes."""

    @app.post("/v1/embeddings")
    async def embeddings(body: Embeddings) -> dict[str, Any]:
        """A vector for each text."""
        given = {"texts": _listed(body.input), "dimensions": body.dimensions}
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
        """The classes of texts, with the probability of each."""
        given = {"texts": _listed(body.input), "pairs": body.pairs}
        return await done(body.model, "classify", given)

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
    return {"prompt_tokens": found["tokens"], "total_tokens": found["tokens"]}
