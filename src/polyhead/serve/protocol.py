"""What clients send, in OpenAI's words, with a limit on every field."""

import base64
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_TEXT = 1_000_000  # characters
MAX_IMAGE = 20_000_000  # bytes
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**24)]], Field(min_length=1, max_length=2**20)]


def _decoded(uri: object) -> bytes:
    """The bytes of a data URI. Nothing is fetched from anywhere."""
    head, comma, data = str(uri).partition(",")
    if not (isinstance(uri, str) and head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError("an image is sent as a data URI: data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True) if comma else b""
    except ValueError:
        raise ValueError("the image's base64 is broken") from None


Image = Annotated[
    bytes, BeforeValidator(_decoded, json_schema_input_type=str),
    Field(min_length=1, max_length=MAX_IMAGE),
]  # fmt: skip


class Body(BaseModel):
    """No field but those that are named."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Body):
    """Text among the parts of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """Where an image is: in the URL itself. detail: every image is read in the model's own size."""

    url: Image
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """An image among the parts of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Called(Body):
    """A function's name, and its arguments as JSON text."""

    name: Annotated[str, Field(max_length=64)]
    arguments: Text


class ToolCall(Body):
    """A call that a message of the assistant made."""

    id: Annotated[str, Field(max_length=64)]
    type: Literal["function"] = "function"
    function: Called

    def said(self) -> dict[str, Any]:
        """As templates read it: the arguments as an object, where they are one."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(Body):
    """One of a conversation. What developers say is the system's."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=64)] | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _speaks(self) -> "Message":
        if self.content is None and not (self.tool_calls and self.role == "assistant"):
            raise ValueError("content is missing; send a text")
        return self

    def said(self) -> dict[str, Any]:
        """As templates read it."""
        told = self.content or ""
        if isinstance(told, list):
            parts = [_part(part) for part in told]
            is_text = not self.images()
            told = "".join(part["text"] for part in parts) if is_text else parts
        role = "system" if self.role == "developer" else self.role
        more = {
            "name": self.name, "tool_call_id": self.tool_call_id,
            "tool_calls": [call.said() for call in self.tool_calls or ()],
        }  # fmt: skip
        return {"role": role, "content": told} | {k: v for k, v in more.items() if v}

    def images(self) -> list[bytes]:
        """The images that it shows, in their order."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


def _part(part: TextPart | ImagePart) -> dict[str, str]:
    is_text = isinstance(part, TextPart)
    return {"type": "text", "text": part.text} if is_text else {"type": "image"}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class StreamOptions(Body):
    """include_usage: a last chunk with what was counted."""

    include_usage: bool = False


class Drawing(Body):
    """What all requests for text share. Fields beyond OpenAI's are named as in GenerationConfig."""

    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    user: Annotated[str, Field(max_length=512)] | None = None
    top_k: int | None = Field(None, ge=0, lt=2**24)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=2**24)
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None

    def drawn(self) -> dict[str, Any]:
        """The fields of GenerationConfig that were said."""
        same = (
            "seed", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty",
            "presence_penalty", "frequency_penalty", "ignore_eos", "logit_bias", "stop_token_ids",
        )  # fmt: skip
        said: dict[str, Any] = {name: getattr(self, name) for name in same}
        said["stop"] = (self.stop,) if isinstance(self.stop, str) else self.stop
        said["min_new_tokens"] = self.min_tokens
        return {name: value for name, value in said.items() if value is not None}


class Completion(Drawing):
    """`/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=64)]
    )
    max_tokens: int | None = Field(16, ge=0, lt=2**24)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def prompts(self) -> list[Any]:
        """Texts or ids, one a prompt."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else list(self.prompt)

    def settings(self) -> dict[str, Any]:
        """Fields of GenerationConfig."""
        said = self.drawn() | {"logprobs": self.logprobs, "max_new_tokens": self.max_tokens}
        return {name: value for name, value in said.items() if value is not None}


class JsonSchema(Body):
    """A schema that the answer follows."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class Function(Body):
    """A function that may be called; parameters: a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """The name of a function."""

    name: Annotated[str, Field(max_length=64)]


class ToolChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: Named


class ResponseFormat(Body):
    """text, any JSON object, JSON of a schema, or text of a grammar (as `GenerationConfig`'s)."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: JsonSchema | None = None
    grammar: Annotated[str, Field(max_length=65_536)] | None = None


class Chat(Drawing):
    """`/v1/chat/completions`."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=2**24)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**24)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _agree(self) -> "Chat":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice needs tools")
        has_form = self.response_format is not None and self.response_format.type != "text"
        if self.must_call and has_form:
            raise ValueError("either response_format or tool_choice says what comes; leave one out")
        names = {tool.function.name for tool in self.tools or ()}
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, not a tool")
        return self

    @property
    def must_call(self) -> bool:
        """Whether a call must come."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    def given(self, stream: bool | None = None) -> dict[str, Any]:
        """What the worker reads. stream: None is as asked."""
        messages = self.messages
        return {
            "messages": [message.said() for message in messages],
            "images": [image for message in messages for image in message.images()],
            "n": self.n, "stream": self.stream if stream is None else stream,
            "settings": self.settings(), **self.calling(),
        }  # fmt: skip

    def calling(self) -> dict[str, Any]:
        """The tools, those of which one must be called, and whether several may be."""
        if self.tools is None or self.tool_choice == "none":
            return {}
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        musts = tools if self.must_call else []
        if isinstance(self.tool_choice, ToolChoice):
            chosen = self.tool_choice.function.name
            musts = [tool for tool in tools if tool["function"]["name"] == chosen]
        return {"tools": tools, "musts": musts, "calls": self.parallel_tool_calls}

    def settings(self) -> dict[str, Any]:
        """Fields of GenerationConfig."""
        most = self.max_completion_tokens or self.max_tokens
        said: dict[str, Any] = self.drawn() | {"max_new_tokens": most}
        if self.logprobs:
            said["logprobs"] = self.top_logprobs or 0
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            said["json_schema"] = {"type": "object"}
        elif wanted is not None and wanted.type == "json_schema" and wanted.json_schema:
            said["json_schema"] = wanted.json_schema.schema_
        elif wanted is not None and wanted.type == "grammar":
            said["grammar"] = wanted.grammar
        return {name: value for name, value in said.items() if value is not None}


class Tokenize(Body):
    """`/tokenize`: a prompt, or messages."""

    model: Name
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one(self) -> "Tokenize":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self

    def given(self) -> dict[str, Any]:
        """What the worker reads."""
        if self.messages is None:
            return {"prompts": [self.prompt]}
        return {"messages": [message.said() for message in self.messages]}


class Detokenize(Body):
    """`/detokenize`."""

    model: Name
    tokens: Ids
