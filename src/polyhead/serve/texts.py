"""`/v1/completions` and `/v1/chat/completions`, whole and as events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from polyhead.serve.messages import Done, Piece


class Shape(Protocol):
    """How one of the two routes says things."""

    prefix: str
    whole: str
    chunk: str

    def choice(self, index: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer."""
        ...

    def first(self, index: int) -> dict[str, Any] | None:
        """What a choice begins with, as events."""
        ...

    def more(self, index: int, said: Piece, logs: bool) -> dict[str, Any]:
        """More of its text. logs: with what is known of tokens."""
        ...

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Why it ended."""
        ...


class CompletionShape:
    """OpenAI's text completions."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer."""
        logprobs = found["logprobs"]
        told = None if logprobs is None else self._logprobs(logprobs)
        return self._choice(index, found["text"], told, found["finish_reason"])

    def first(self, index: int) -> None:
        """Nothing."""

    def more(self, index: int, said: Piece, logs: bool) -> dict[str, Any]:
        """More of its text."""
        return self._choice(index, said.text, self._logprobs(said.logprobs) if logs else None, None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Why it ended."""
        return self._choice(index, "", None, reason)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        offsets, at = [], 0
        for each in found:
            offsets.append(at)
            at += len(each["token"])
        return {
            "tokens": [each["token"] for each in found],
            "token_logprobs": [each["logprob"] for each in found],
            "top_logprobs": [
                {one["token"]: one["logprob"] for one in each["top"]} for each in found
            ],
            "text_offset": offsets,
        }


class ChatShape:
    """OpenAI's chat completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """A choice of an answer."""
        calls = [_call(call) for call in found.get("calls", ())]
        text = found["text"] or None if calls else found["text"]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        told = self._logprobs(found["logprobs"])
        return {
            "index": index,
            "message": message,
            "logprobs": told,
            "finish_reason": found["finish_reason"],
        }

    def first(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def more(self, index: int, said: Piece, logs: bool) -> dict[str, Any]:
        """More of its text, and calls of tools."""
        delta: dict[str, Any] = {"content": said.text} if said.text or not said.calls else {}
        if said.calls:
            delta["tool_calls"] = [{"index": call["index"], **_call(call)} for call in said.calls]
        return self._delta(index, delta, self._logprobs(said.logprobs if logs else None), None)

    def last(self, index: int, reason: str) -> dict[str, Any]:
        """Why it ended."""
        return self._delta(index, {}, None, reason)

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        content = [
            {**_token(each), "top_logprobs": [_token(one) for one in each["top"]]} for each in found
        ]
        return {"content": content, "refusal": None}


def _token(found: Mapping[str, Any]) -> dict[str, Any]:
    text = found["token"]
    return {"token": text, "logprob": found["logprob"], "bytes": found["bytes"]}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": call["id"], "type": "function", "function": function}


def answered(shape: Shape, model: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The whole of an answer."""
    choices = [shape.choice(index, found) for index, found in enumerate(result["choices"])]
    return _opened(shape, shape.whole, model) | {"choices": choices, "usage": usage(result)}


async def events(
    shape: Shape,
    model: str,
    answers: AsyncGenerator[Piece | Done],
    counts: bool,
    logs: bool,
) -> AsyncGenerator[str]:
    """The data of each event, `[DONE]` at the end. counts: a last chunk says what was used."""
    head = _opened(shape, shape.chunk, model)
    if counts:
        head["usage"] = None

    opening = json.dumps(head)[:-1]  # the same in every event

    def chunk(*choices: dict[str, Any]) -> str:
        return f'{opening}, "choices": {json.dumps(choices, ensure_ascii=False)}}}'

    begun: set[int] = set()
    told: dict[int, int] = {}
    async for heard in answers:
        if isinstance(heard, Piece):
            if heard.choice not in begun:
                begun.add(heard.choice)
                if (first := shape.first(heard.choice)) is not None:
                    yield chunk(first)
            told[heard.choice] = told.get(heard.choice, 0) + len(heard.logprobs)
            yield chunk(shape.more(heard.choice, heard, logs))
            continue
        for index, found in enumerate(heard.result["choices"]):
            if index not in begun and (first := shape.first(index)) is not None:
                yield chunk(first)
            rest = (found["logprobs"] or [])[told.get(index, 0) :]
            if rest:
                yield chunk(shape.more(index, Piece(heard.number, index, "", tuple(rest)), logs))
            yield chunk(shape.last(index, found["finish_reason"]))
        if counts:
            last = {**head, "choices": [], "usage": usage(heard.result)}
            yield json.dumps(last)
    yield "[DONE]"


def usage(result: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens of prompts, each counted once, and of choices."""
    choices, prompts = result["choices"], result["prompt_tokens"]
    per_prompt = len(choices) // max(1, result["num_prompts"])
    read, written = sum(prompts[::per_prompt]), sum(found["tokens"] for found in choices)
    return {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": result["found"]},
    }  # fmt: skip


def _opened(shape: Shape, kind: str, model: str) -> dict[str, Any]:
    number = f"{shape.prefix}{uuid.uuid4().hex}"
    return {"id": number, "object": kind, "created": int(time.time()), "model": model}
