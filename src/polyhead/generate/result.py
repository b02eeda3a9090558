"""What generation gives back."""

from collections.abc import Sequence
from typing import NamedTuple, Self


class TokenLogprob(NamedTuple):
    """Natural log-probabilities at one generated token, by the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with theirs, the likeliest first."""


class Generation(str):
    """The generated text, with where it came from.

    token_ids: every id drawn, the one that ended it included. finish_reason: "stop" (an end token
    or a stop string) or "length" (max_new_tokens, or the model's context is full). logprobs: one
    entry a token, or None where not asked for. prompt_tokens: ids the model was given. score: what
    a search found it by, log-probability / length ** penalty.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str
    prompt_tokens: int
    score: float | None

    def __new__(
        cls,
        text: str,
        token_ids: Sequence[int] = (),
        logprobs: Sequence[TokenLogprob] | None = None,
        finish_reason: str = "stop",
        prompt_tokens: int = 0,
        score: float | None = None,
    ) -> Self:
        self = super().__new__(cls, text)
        self.token_ids = tuple(token_ids)
        self.logprobs = None if logprobs is None else tuple(logprobs)
        self.finish_reason = finish_reason
        self.prompt_tokens = prompt_tokens
        self.score = score
        return self
