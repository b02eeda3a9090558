"""Beam search: the likeliest answers, several at a time. `A` texts at work, `n` beams, `V` tokens.

The same steps and the same scores as in transformers, each text by itself.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.steps import Steps
from polyhead.text.tokenizer import Tokenizer

# Beams that repeat the first one before anything is written: worse than all that can be written.
_COPY = -1e9


class Hypothesis(NamedTuple):
    """An answer's ids, its end token included, and its score: log-probability / length ** penalty.

    A drawn or greedy answer has no score.
    """

    ids: tuple[int, ...]
    score: float = 0.0


def beam_search(
    steps: Steps,
    logits: Tensor,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    ends: Collection[int],
    tokenizer: Tokenizer | None = None,
) -> list[list[Hypothesis]]:
    """Up to `num_beams` finished answers of each text, the best first.

    logits: `[texts, V]` after the prompts. ends: the tokens that end an answer.
    """
    num_beams = config.num_beams
    rows = num_beams * len(prompts)
    most = max(map(len, prompts)) + config.max_new_tokens
    sampler = Sampler(rows, most, logits.shape[1], logits.device, tokenizer)
    slots = [
        [sampler.open(config, prompt, 0, ends) for _ in range(num_beams)] for prompt in prompts
    ]
    searches = [_Search(config, ends) for _ in prompts]
    at_work = list(range(len(prompts)))
    steps.select([text for text in at_work for _ in range(num_beams)])
    logits = logits.repeat_interleave(num_beams, dim=0)
    while True:
        working = [searches[text] for text in at_work]
        logprobs = logits.float().log_softmax(1)
        beams = [slot for text in at_work for slot in slots[text]]
        answers = [answer for search in working for answer in search.answers]
        for slot, answer in zip(beams, answers, strict=True):
            sampler.write(slot, 0, answer)
        logprobs = sampler.constrain(logprobs, beams, list(map(len, answers)))
        parents = _advance(working, logprobs, num_beams)
        going = [number for number, search in enumerate(working) if not search.is_done]
        if not going:
            return [search.results() for search in searches]
        rows = [number * num_beams + parent for number in going for parent in parents[number]]
        steps.select(rows, going if len(going) < len(working) else None)
        at_work = [at_work[number] for number in going]
        last = [[answer[-1]] for text in at_work for answer in searches[text].answers]
        logits = steps.read(torch.tensor(last, device=logits.device))


def _advance(working: list["_Search"], logprobs: Tensor, num_beams: int) -> list[list[int]]:
    """Give every search its best continuations; the beams that each goes on from."""
    so_far = torch.tensor([search.scores for search in working], device=logprobs.device)
    totals = logprobs.unflatten(0, (-1, num_beams)) + so_far[:, :, None]
    vocab_size, totals = totals.shape[2], totals.flatten(1)
    # So many that, all end tokens aside, enough are left to go on with.
    wanted = max(2, 1 + len(working[0].ends)) * num_beams
    best = totals.topk(min(wanted, totals.shape[1]), dim=1)
    found = zip(working, best.values.tolist(), best.indices.tolist(), strict=True)
    return [search.take(values, indices, vocab_size) for search, values, indices in found]


class _Search:
    """One text: its unfinished answers, the best first, and the best finished ones."""

    def __init__(self, config: GenerationConfig, ends: Collection[int]) -> None:
        self.config, self.ends = config, ends
        self.answers: list[list[int]] = [[] for _ in range(config.num_beams)]
        self.scores = [0.0] + [_COPY] * (config.num_beams - 1)
        self.finished: list[Hypothesis] = []
        self.is_done = False

    def take(self, scores: list[float], places: list[int], vocab_size: int) -> list[int]:
        """Go on with the best of these continuations; returns the beams that they extend."""
        config, num_beams = self.config, self.config.num_beams
        length = len(self.answers[0]) + 1
        is_last = length == config.max_new_tokens
        going: list[tuple[float, int, int]] = []
        for rank, (score, place) in enumerate(zip(scores, places, strict=True)):
            beam, token = divmod(place, vocab_size)
            if not is_last and token not in self.ends:
                going.append((score, beam, token))
            # What ends below the best is there to be overtaken, not to be kept.
            elif rank < num_beams and score > _COPY:
                ids = (*self.answers[beam], token)
                self.finished.append(Hypothesis(ids, score / length**config.length_penalty))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[num_beams:]
        going = going[:num_beams]
        self.is_done = is_last or self._cannot_improve(going[0][0], length)
        if not self.is_done:
            self.answers = [[*self.answers[beam], token] for _, beam, token in going]
            self.scores = [score for score, _, _ in going]
        return [beam for _, beam, _ in going]

    def _cannot_improve(self, best: float, length: int) -> bool:
        config = self.config
        if best == float("-inf"):
            return True
        if len(self.finished) < config.num_beams:
            return False
        if config.early_stopping is True:
            return True
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_new_tokens
        return best / length**config.length_penalty <= self.finished[-1].score

    def results(self) -> list[Hypothesis]:
        return self.finished or [Hypothesis(tuple(self.answers[0]), self.scores[0])]
