"""Prompts to ids that a model can take."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The ids of a text (with the tokenizer's special tokens) or ids as given, checked.

    An empty prompt starts from the bos token, or, as GPT-2 does, from eos. Errors: DataError for
    an empty prompt where there is neither, for a text or an empty prompt without a tokenizer, and
    for ids that the model has no row for.
    """
    ids = [] if isinstance(prompt, str) else _whole_numbers(prompt)
    if tokenizer is None and not ids:
        raise DataError("there is no tokenizer to read the prompt with; give it as token ids")
    if tokenizer is not None and isinstance(prompt, str):
        ids = _opened(prompt, tokenizer)
    if tokenizer is not None and not ids:
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if first is None:
            raise DataError(
                "the prompt is empty and the tokenizer has neither a bos nor an eos token to "
                "start from; give some text"
            )
        ids = [first]
    check_ids(ids, vocab_size)
    return ids


def encode_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a conversation by the tokenizer's chat template, which writes its own specials.

    messages: `{"role": ..., "content": ...}` each. Errors: DataError where there is no template.
    """
    text = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt
    )
    return tokenizer.encode(text, add_special_tokens=False)


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """DataError for an id outside the model's vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise DataError(
                f"token id {token_id} is outside the model's vocabulary of {vocab_size}; "
                "use the tokenizer that belongs to this model"
            )


def _opened(text: str, tokenizer: Tokenizer) -> list[int]:
    """With the special tokens that begin a text, without one that would end it."""
    ids = tokenizer.encode(text)
    if ids and ids[-1] == tokenizer.eos_id:
        bare = tokenizer.encode(text, add_special_tokens=False)
        if bare[-1:] != ids[-1:]:
            return ids[:-1]
    return ids


def _whole_numbers(prompt: Sequence[int]) -> list[int]:
    try:
        return [operator.index(i) for i in prompt]
    except TypeError:
        raise DataError(
            f"a prompt is a string or a list of token ids, not {str(prompt)[:40]!r}"
        ) from None


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as `[B, T]`, padded on the right, and which of them count."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]
