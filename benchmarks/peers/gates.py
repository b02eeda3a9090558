"""Whether what a contender computes is what it should: a word beside each figure."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.rows import Row

REGRET, DRIFT, COSINE, PERPLEXITY = 0.1, 0.05, 0.99, 0.05
"""The most that may be lost: nats a token, nats a token, the least cosine, a share."""

Ask = Callable[[str, dict[str, Any]], Any]
"""Ours, asked for the answer of a job with options."""


@dataclass(frozen=True)
class Gate:
    """Whether a contender passed, and what was seen."""

    passed: bool
    words: str

    def __str__(self) -> str:
        return self.words if self.passed else f"FAILED: {self.words}"


def greedy(
    row: Row, given: Mapping[str, Any], answers: Mapping[str, Any], ask: Ask
) -> dict[str, Gate]:
    """Texts are near what our fp32 would have written: few tokens of theirs are less likely."""
    options = {name: given[name] for name in ("model", "prompts")}
    found = ask("judge", {**options, "written": dict(answers)})
    return {
        name: Gate(
            one["regret"] <= REGRET,
            f"{one['same']:.0f} of {one['of']} as fp32, {one['regret']:.3f} nats lost",
        )
        for name, one in found.items()
    }


def translations(
    row: Row, given: Mapping[str, Any], answers: Mapping[str, Any], ask: Ask
) -> dict[str, Gate]:
    """Beams found texts as likely to our fp32 as those that it finds itself."""
    options = {name: given[name] for name in ("model", "sources")}
    plain = ask("translate", {**given, "form": "plain"})
    written = {"plain": plain, **answers}
    found: dict[str, float] = ask("judge_translations", {**options, "written": written})
    best = found.pop("plain")
    return {
        name: Gate(
            found[name] >= best - DRIFT,
            f"{sum(a == b for a, b in zip(answers[name], plain, strict=True))} of {len(plain)} "
            f"as fp32, {max(best - found[name], 0):.3f} nats lost",
        )
        for name in found
    }


def cosine(
    row: Row, given: Mapping[str, Any], answers: Mapping[str, Any], ask: Ask
) -> dict[str, Gate]:
    """Vectors point where our fp32 without any kernel points."""
    plain = ask(row.job, {**given, "form": "plain"})
    found = {}
    for name, answer in answers.items():
        least = min(map(_cosine, answer, plain))
        found[name] = Gate(least >= COSINE, f"cosine {least:.4f}")
    return found


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return _dot(a, b) / math.sqrt(_dot(a, a) * _dot(b, b))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def perplexity(
    row: Row, given: Mapping[str, Any], answers: Mapping[str, Any], ask: Ask
) -> dict[str, Gate]:
    """Perplexity is little above that of our fp32, which is the row's ours."""
    plain = math.exp(answers[row.ours.name])
    shares = {name: math.exp(nats) / plain - 1 for name, nats in answers.items()}
    return {
        name: Gate(share <= PERPLEXITY, f"{share:+.2%} beside fp32")
        for name, share in shares.items()
    }


GATES: dict[str, Callable[..., dict[str, Gate]]] = {
    gate.__name__: gate for gate in (greedy, translations, cosine, perplexity)
}
