"""`/v1/responses`: OpenAI's newer way to ask for text, whole and as events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from polyhead.serve.messages import Done, Piece
from polyhead.serve.protocol import Body, Chat, Name, Text
from polyhead.serve.texts import usage


class TextItem(Body):
    """Text among the parts of a message."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ImageItem(Body):
    """An image among them, as a data URI."""

    type: Literal["input_image"]
    image_url: Annotated[str, Field(max_length=30_000_000)]
    detail: Literal["auto", "low", "high"] = "auto"


Item = Annotated[TextItem | ImageItem, Field(discriminator="type")]


class Turn(Body):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    id: Annotated[str, Field(max_length=128)] | None = None
    status: Annotated[str, Field(max_length=32)] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Item], Field(max_length=256)]

    def said(self) -> dict[str, Any]:
        """As `Chat` has it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": item.text}
            if isinstance(item, TextItem)
            else {"type": "image_url", "image_url": {"url": item.image_url, "detail": item.detail}}
            for item in self.content
        ]
        return {"role": self.role, "content": parts}


class Format(Body):
    """Text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """What the text must be."""

    format: Format = Field(default_factory=Format)
    verbosity: Literal["low", "medium", "high"] | None = None


class Response(Body):
    """`/v1/responses`. Each request brings the whole conversation. background: it goes on while
    nobody listens, and can be heard for some minutes."""

    model: Name
    input: Text | Annotated[list[Turn], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**24)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    text: TextOptions = Field(default_factory=TextOptions)
    stream: bool = False
    background: bool = False
    store: bool | None = None
    metadata: Annotated[dict[str, Text], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    def chat(self) -> Chat:
        """The same, as the older route has it. Errors: pydantic's, for an image that is none."""
        turns = (
            [Turn(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        )
        said = [{"role": "system", "content": self.instructions}] if self.instructions else []
        body: dict[str, Any] = {
            "model": self.model, "messages": [*said, *(turn.said() for turn in turns)],
            "max_completion_tokens": self.max_output_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "seed": self.seed, "stream": self.stream,
        }  # fmt: skip
        wanted = self.text.format
        if wanted.type == "json_object":
            body["response_format"] = {"type": "json_object"}
        elif wanted.type == "json_schema":
            schema = {"name": wanted.name or "answer", "schema": wanted.schema_ or {}}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return Chat.model_validate(body)


class Responding:
    """One answer, in the shapes of the route."""

    def __init__(self, asked: Response) -> None:
        self.asked, self.began = asked, int(time.time())
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number = -1

    def whole(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, once it is there."""
        (found,) = result["choices"]
        is_cut = found["finish_reason"] == "length"
        counts = usage(result)
        return self.shell("incomplete" if is_cut else "completed") | {
            "output": [self._message(found["text"], "incomplete" if is_cut else "completed")],
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    async def events(
        self, answers: AsyncGenerator[Piece | Done]
    ) -> AsyncGenerator[tuple[str, str]]:
        """Names and data of the events, in OpenAI's order."""
        shell, part = self.shell(), {"type": "output_text", "annotations": []}
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=shell)
        yield self._event("response.in_progress", response=shell)
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **place, part={**part, "text": ""})
        async for told in answers:
            if isinstance(told, Piece):
                if told.text:
                    yield self._event(
                        "response.output_text.delta", **place, delta=told.text, logprobs=[]
                    )
                continue
            done = self.whole(told.result)
            (item,) = done["output"]
            text = item["content"][0]["text"]
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part={**part, "text": text})
            yield self._event("response.output_item.done", output_index=0, item=item)
            yield self._event(f"response.{done['status']}", response=done)

    def _event(self, name: str, **said: Any) -> tuple[str, str]:
        self._number += 1
        data = {"type": name, "sequence_number": self._number, **said}
        return name, json.dumps(data, ensure_ascii=False)

    def _message(self, text: str, status: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
        return {
            "type": "message", "id": self.item, "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    def shell(self, status: str = "in_progress") -> dict[str, Any]:
        """The answer, without what is not there yet."""
        asked = self.asked
        return {
            "id": self.id, "object": "response", "created_at": self.began, "status": status,
            "model": asked.model, "output": [], "error": None, "incomplete_details": None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature, "top_p": asked.top_p,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
            "store": asked.background, "background": asked.background,
            "previous_response_id": None, "text": asked.text.model_dump(by_alias=True),
            "truncation": "disabled", "user": asked.user, "usage": None,
        }  # fmt: skip
