"""One row that a `Sampler` draws for: its config, its text, and what follows it."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling.walk import Walk


@dataclass
class Slot:
    """ends: the tokens that end the text. ids: the text so far, drafts included."""

    config: GenerationConfig
    prompt: tuple[int, ...]
    seed: int
    ends: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    accepted: int = 0
    nodes: list[int] = field(default_factory=lambda: [0])
    compiled: Future[Walk] | None = None
    walk: Walk | None = None
    problem: str = ""
    is_plain: bool = False
    """Whether nothing edits its scores, as is known of its config."""

    @cached_property
    def needs_history(self) -> bool:
        """Whether anything looks at what stands before."""
        c = self.config
        return bool(
            c.repetition_penalty != 1
            or c.presence_penalty
            or c.frequency_penalty
            or c.dry_multiplier
            or c.no_repeat_ngram_size
            or c.sequence_bias
            or any(len(word) > 1 for word in c.bad_words_ids)
        )

    def write(self, start: int, ids: Sequence[int]) -> None:
        """Tokens `start, start + 1, ...` of the text; what stood after them is gone."""
        self.ids[start:] = ids
        del self.nodes[max(start - len(self.config.forced_ids), 0) + 1 :]

    def free(self, written: int) -> list[int]:
        """The first `written` tokens of the text, without those that were forced."""
        return self.ids[len(self.config.forced_ids) : written]

    def forced(self, written: int) -> int | None:
        """The token that must come next, if any."""
        ids = self.config.forced_ids
        if written < len(ids):
            return ids[written]
        is_last = written == self.config.max_new_tokens - 1
        return self.config.forced_eos_token_id if is_last else None

    def node(self, written: int) -> int:
        """Where the text stands in the trie."""
        wanted = self.free(written)
        while len(self.nodes) <= len(wanted):
            token = wanted[len(self.nodes) - 1]
            self.nodes.append(self.config.trie.step(self.nodes[-1], token))
        return self.nodes[len(wanted)]

    def fork(self, seed: int) -> Self:
        """The same text and state."""
        walk = None if self.walk is None else self.walk.fork()
        return replace(self, seed=seed, ids=[*self.ids], nodes=[*self.nodes], walk=walk)
