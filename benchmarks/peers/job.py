"""What a worker can do again and again, whatever the library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Job:
    """One piece of work, ready to be done.

    run: does it once; the seconds that count. answer: what comes of it, for the gates, as JSON can
    hold it. facts: what else is to be known of it, such as the bytes of its weights. notes: what
    each run notes beside, such as the seconds to the first token; the worker gives the medians.
    """

    run: Callable[[], float]
    answer: Callable[[], Any] = lambda: None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[float]] = field(default_factory=dict)


def timed(call: Callable[[], Any]) -> float:
    """The seconds of a call."""
    began = perf_counter()
    call()
    return perf_counter() - began


def writing(
    write: Callable[[list[list[int]], Callable[[], None]], list[list[int]]],
    prompts: Sequence[Sequence[int]],
    facts: dict[str, Any],
) -> Job:
    """Prompts that are gone on with: the seconds after every text has its first token count.

    write: prompts to the ids that follow them; calls its second argument when all texts have one.
    """
    turn, first = 0, list[float]()

    def run() -> float:
        nonlocal turn
        turn += 1
        marks = [perf_counter()]
        write(varied(prompts, turn), lambda: marks.append(perf_counter()))
        first.append(marks[1] - marks[0])
        return perf_counter() - marks[1]

    def answer() -> list[list[int]]:
        return write([list(prompt) for prompt in prompts], lambda: None)

    return Job(run, answer, facts, {"first_token": first})


def varied(prompts: Sequence[Sequence[int]], turn: int) -> list[list[int]]:
    """Prompts that begin like none before, so that nothing of them is found in a cache."""
    return [[100 + (prompt[0] + turn) % 40000, *prompt[1:]] for prompt in prompts]
