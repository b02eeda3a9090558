"""The texts of one job as they come, and the calls of tools in them."""

import random
import string
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from polyhead.generate.request import Request
from polyhead.generate.result import Generation, TokenLogprob
from polyhead.serve.messages import Done, Piece, failure
from polyhead.text.tokenizer import Tokenizer
from polyhead.text.tool_calls import Call, CallReader, ToolFormat

Say = Callable[[Any], None]
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Calls:
    """The tools that a text may call. musts: of which one must be; several: whether more may be."""

    form: ToolFormat
    tools: Sequence[Mapping[str, Any]]
    musts: Sequence[Mapping[str, Any]]
    several: bool

    def reader(self) -> "Called":
        """For one text."""
        return Called(self)


class Called:
    """The calls of one text, numbered, each with an id."""

    def __init__(self, calls: Calls) -> None:
        names = [tool["function"]["name"] for tool in calls.tools]
        self._reader, self._several = CallReader(calls.form, names), calls.several
        self.found: list[dict[str, Any]] = []
        # What the prompt ends with is part of the call.
        self._begun = calls.form.heard(calls.musts) if calls.musts else ""
        self._reader.feed(self._begun)

    def feed(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What is said, and the calls that are whole."""
        said, calls = self._reader.feed(text)
        room = None if self._several else max(0, 1 - len(self.found))
        new = [self._told(len(self.found) + n, call) for n, call in enumerate(calls[:room])]
        self.found += new
        return said, new

    def end(self) -> str:
        """What was held back and is no call."""
        return self._reader.end().removeprefix(self._begun)

    def _told(self, index: int, call: Call) -> dict[str, Any]:
        # Of nine letters: some templates take no other.
        number = "".join(random.SystemRandom().choices(_LETTERS, k=9))
        return {"index": index, "id": number, **call._asdict()}


class Choices:
    """The texts of one job, heard in the engine's thread."""

    def __init__(
        self,
        number: int,
        num_prompts: int,
        n: int,
        tokenizer: Tokenizer,
        say: Say,
        calls: Calls | None = None,
        bytes_of: Callable[[int], bytes | None] = lambda _: None,
    ) -> None:
        count, self.num_prompts = num_prompts * n, num_prompts
        self.number, self.tokenizer, self.say = number, tokenizer, say
        self.results: list[Generation | None] = [None] * count
        self.left, self.told = count, [0] * count
        self.requests: list[Future[Request]] = [Future() for _ in range(count)]
        self.has_failed, self.bytes_of = False, bytes_of
        self.heard: set[int] = set()  # whose texts are told as they come
        self.readers = [None if calls is None else calls.reader() for _ in range(count)]

    def listener(self, choice: int) -> Callable[[str], None]:
        """Sends each piece of a choice as it becomes certain, with the tokens since the last."""

        self.heard.add(choice)

        def hear(text: str) -> None:
            reader, calls = self.readers[choice], list[dict[str, Any]]()
            if reader is not None:
                text, calls = reader.feed(text)
                if not text and not calls:
                    return
            (written,) = self.requests[choice].result().texts[:1] or [None]
            new = [] if written is None else written.logprobs[self.told[choice] :]
            self.told[choice] += len(new)
            logprobs = tuple(self._logprob(one) for one in new)
            self.say(Piece(self.number, choice, text, logprobs, tuple(calls)))

        return hear

    def end(self, choice: int, request: Request) -> bool:
        """Take what came of a choice; whether that was the last."""
        self.left -= 1
        if request.error is not None and not self.has_failed:
            self.has_failed = True
            self.say(failure(self.number, request.error))
        elif request.results:
            self.results[choice] = request.results[0]
        if not self.left and not self.has_failed:
            found = [self._told(i, each) for i, each in enumerate(self.results) if each is not None]
            prompts = [result.prompt_tokens for result in self.results if result is not None]
            self.say(
                Done(
                    self.number,
                    {
                        "choices": found,
                        "prompt_tokens": prompts,
                        "num_prompts": self.num_prompts,
                        "found": request.found,
                    },
                )
            )
        return not self.left

    def _told(self, choice: int, result: Generation) -> dict[str, Any]:
        logprobs, reader, text = result.logprobs, self.readers[choice], str(result)
        if reader is not None and choice not in self.heard:
            text = reader.feed(text)[0]
        calls = [] if reader is None else reader.found
        if reader is not None:
            rest = reader.end()
            if rest and choice in self.heard:
                self.say(Piece(self.number, choice, rest))
            text += rest
        return {
            "text": text, "calls": calls,
            "finish_reason": "tool_calls" if calls else result.finish_reason,
            "tokens": len(result.token_ids),
            "logprobs": None if logprobs is None else [self._logprob(each) for each in logprobs],
        }  # fmt: skip

    def _logprob(self, found: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(found.token_id), "logprob": found.logprob,
            "top": [{**self._token(i), "logprob": value} for i, value in found.top],
        }  # fmt: skip

    def _token(self, token_id: int) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        # A token may be part of a letter, of which its bytes alone tell.
        return {
            "id": token_id,
            "token": text,
            "bytes": list(self.bytes_of(token_id) or text.encode()),
        }
