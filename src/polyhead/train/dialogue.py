"""Conversations as tokens, and which of them the model is to say."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polyhead.errors import ConfigError, DataError

Message = Mapping[str, Any]
_MARK = "polyhead-mark"


class Spoken(NamedTuple):
    """ids `[T]` of a conversation, and which of them are the model's own `[T]`."""

    ids: np.ndarray
    own: np.ndarray


def conversation(tokenizer: Any, messages: Any, where: str) -> Spoken:
    """A row's messages, whose last is the assistant's. Errors: DataError at `where`."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages are {str(messages)[:60]!r}; give a list of some")
    if not isinstance(messages[-1], dict) or messages[-1].get("role") != "assistant":
        raise DataError(f"{where}: the last message is not the assistant's: there is no answer")
    return spoken(tokenizer, messages)


def opening(row: Mapping[str, Any]) -> list[Message]:
    """What stands before the answer to a row's prompt."""
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [*first, {"role": "user", "content": row["prompt"]}]


def spoken(tokenizer: Any, messages: Sequence[Message]) -> Spoken:
    """A conversation by the tokenizer's chat template; the assistant's words and the token that
    ends them are the model's own. Errors: as `apply_chat_template`.
    """
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    spans = [
        _span(tokenizer, messages, turn, text)
        for turn, message in enumerate(messages)
        if message.get("role") == "assistant"
    ]
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    own = np.zeros(len(encoding.ids), bool)
    for start, end in spans:
        own |= [start < stop <= end and begin >= start for begin, stop in encoding.offsets]
    return Spoken(np.asarray(encoding.ids, np.int64), own)


def _span(tokenizer: Any, messages: Sequence[Message], turn: int, text: str) -> tuple[int, int]:
    """Where in the text a turn of the assistant's stands, from what it is asked with to the token
    that ends it."""
    content = messages[turn].get("content")
    marked = [*messages[:turn], {**messages[turn], "content": _MARK}, *messages[turn + 1 :]]
    probe = tokenizer.apply_chat_template(marked, add_generation_prompt=False)
    before, found, after = probe.partition(_MARK)
    if isinstance(content, str) and found and text.startswith(before) and text.endswith(after):
        start, end = len(before), len(text) - len(after)
    else:  # calls of tools, and templates that read the words
        alone = tokenizer.apply_chat_template(messages[: turn + 1], add_generation_prompt=False)
        start = end = _shared(alone, text)
    # What the template itself begins an answer with, the model has to write.
    asked = tokenizer.apply_chat_template(messages[:turn]) if turn else ""
    start = min(start, len(asked)) if text.startswith(asked) else start
    rest = text[end:].lstrip()
    closed = max((t for t in tokenizer.special_texts if rest.startswith(t)), key=len, default="")
    return start, len(text) - len(rest) + len(closed) if closed else end


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin alike with."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def answered(tokenizer: Any, row: Mapping[str, Any], role: str, where: str, raw: bool) -> Spoken:
    """The answer of a row under `role` after its prompt: by the tokenizer's chat template, or after
    the prompt as it is, where there is none and with `raw`.

    Errors: DataError at `where` for a row that lacks either.
    """
    for name in ("prompt", role):
        if not isinstance(row.get(name), str) or not row[name]:
            raise DataError(f"{where}: {name} is {row.get(name)!r}; it must be text")
    if tokenizer.chat_template is not None and not raw:
        return spoken(tokenizer, [*opening(row), {"role": "assistant", "content": row[role]}])
    if row.get("system"):
        why = "raw leaves out" if raw else "no chat template takes"
        raise DataError(f"{where} has a system message, which {why}: put it into the prompt")
    return continued(tokenizer, row["prompt"], row[role])


def continued(tokenizer: Any, prompt: str, answer: str) -> Spoken:
    """A text and what continues it, without a template; the model ends its part with eos."""
    end = tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id
    if end is None:
        raise ConfigError("the tokenizer has no token that ends an answer: give it an eos")
    before = tokenizer.encode(prompt)
    if before and before[-1] == end:
        before = before[:-1]
    after = [*tokenizer.encode(answer, add_special_tokens=False), end]
    own = np.arange(len(before) + len(after)) >= len(before)
    return Spoken(np.asarray([*before, *after], np.int64), own)
