"""Prompts of samples: a template over a row's columns, examples before it, and a model's ids."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, DataError
from polyhead.generate.prompts import encode_chat, encode_prompt
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.samples import text_of
from polyhead.tasks.evaluate.scorer import Request
from polyhead.text.tokenizer import Tokenizer

_NAME = re.compile(r"\{(\w+)\}")
BETWEEN = "\n\n"
"""What stands between examples."""


class Prompter:
    """A model's ids of prompts and of what follows them.

    chat: a prompt becomes the user's message in the tokenizer's template.
    Errors: ConfigError for `chat` with a tokenizer that has no template.
    """

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, chat: bool = False) -> None:
        if chat and tokenizer.chat_template is None:
            raise ConfigError("the tokenizer has no chat template; leave out chat")
        self.tokenizer, self.chat = tokenizer, chat
        self.vocab_size: int = getattr(model.config, "vocab_size")  # noqa: B009
        self.writes_apart = getattr(model.config, "kind", "decoder") == "encoder-decoder"

    def prompt(self, text: str) -> list[int]:
        """What a model that is to answer reads."""
        if self.chat:
            return encode_chat([{"role": "user", "content": text}], self.tokenizer)
        if self.writes_apart:
            return self.tokenizer.encode(text)
        return encode_prompt(text, self.tokenizer, self.vocab_size)

    def pairs(self, context: str, continuations: Sequence[str]) -> list[Request]:
        """Ids of a context and of each of what may follow, cut where those of both together are.

        Spaces at the end of the context go over to the continuations, as in lm-eval's
        `TemplateLM._encode_pair`. Errors: DataError for a continuation that becomes no token.
        """
        bare = context if self.chat or self.writes_apart else context.rstrip()
        before = self.prompt(bare)
        found: list[Request] = []
        for continuation in continuations:
            if self.writes_apart:
                ids = self.tokenizer.encode_targets([continuation.lstrip()])[0]
            elif self.chat:
                ids = self.tokenizer.encode(continuation.lstrip(), add_special_tokens=False)
            elif bare:
                ids = self.prompt(context + continuation)[len(before) :]
            else:
                ids = self.tokenizer.encode(context + continuation, add_special_tokens=False)
            if not ids:
                raise DataError(f"{continuation!r} becomes no token after the prompt; change it")
            found.append(Request(before, ids))
        return found


def question_of(
    prompt: str | None, row: Mapping[str, Any], column: str, number: int, path: Path
) -> str:
    """A row's question: the template with the columns that it names in braces, or the column.

    Errors: ConfigError for a template that names what is not there, DataError for a row without
    the column.
    """
    if prompt is None:
        return text_of(row, column, number, path)

    def value(found: re.Match[str]) -> str:
        if found[1] not in row:
            raise ConfigError(
                f"the prompt names {{{found[1]}}}, and the columns are {', '.join(row)}"
            )
        return str(row[found[1]])

    return _NAME.sub(value, prompt)


def check_shots(shots: int, rows: int, path: Path) -> None:
    """ConfigError for more examples than leave a row to ask."""
    if not 0 <= shots < rows:
        raise ConfigError(
            f"shots={shots} must be from 0 to {rows - 1}: {path} has {rows} rows, and the first "
            "are the examples"
        )
