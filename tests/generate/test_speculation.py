"""What is drawn with guesses ahead has the model's own distribution, whoever guesses."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tests.nn.parts import shaken
from torch import Tensor

import polyhead as ph
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.speculative import DraftModel, Jacobi, NgramLookup, Proposer, first_layers
from polyhead.models.model import TaskModel

V, LENGTH, TEXTS, ROWS = 16, 3, 4000, 500
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1]
TEMPERATURE, TOP_K = 0.9, 14
LEAST = 1e-3
"""A probability that no sample of the right distribution falls below; seeds are fixed."""

PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "ngram": lambda: NgramLookup(2, longest=1),
    "jacobi": lambda: Jacobi(2),
    "draft": lambda: DraftModel(made(1), 2, max_rows=ROWS),
    "early exit": lambda: DraftModel(first_layers(made(0), 1), 2, max_rows=ROWS),
}


@cache
def made(seed: int) -> TaskModel:
    sizes: dict[str, Any] = dict(d_model=16, num_layers=2, num_heads=2, max_seq_len=16)
    return shaken(ph.build("gpt2", vocab_size=V, seed=seed, **sizes).eval(), 0.25, 0)


@cache
def exact() -> Tensor:
    """Probabilities `[V, V, V]` of every text, by whole forwards."""
    grid = torch.arange(V)
    starts = torch.cartesian_prod(grid, grid)
    ids = torch.cat([torch.tensor(PROMPT).expand(V * V, -1), starts], dim=1)
    with torch.inference_mode():
        logits = made(0)(ids)[:, -LENGTH:].double() / TEMPERATURE
    least = logits.topk(TOP_K).values[..., -1:]
    likely = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
    first, second, third = likely.unflatten(0, (V, V)).unbind(2)
    return first[0, 0][:, None, None] * second[:, 0][:, :, None] * third


def drawn(proposer: Proposer | None, sampler: Callable[[Any], Any] | None = None) -> Tensor:
    """Texts `[N, LENGTH]`, each of a seed of its own."""
    settings = EngineConfig(max_rows=ROWS, cache_tokens=ROWS * 16, block_size=4)
    engine = Engine(made(0), None, settings, proposer)
    if sampler is not None:
        engine.postprocess.drawing.sampler = sampler(engine.sampler)
    config = GenerationConfig(
        temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=LENGTH, num_return_sequences=ROWS
    )
    requests = [
        engine.add(PROMPT, config, seeds=range(start, start + ROWS), ends=())
        for start in range(0, TEXTS, ROWS)
    ]
    engine.run()
    return torch.tensor([text.token_ids for request in requests for text in request.outcome()])


def chance(texts: Tensor, dims: tuple[int, int]) -> float:
    """The probability that pairs of tokens fall at least as far from `exact` as these, by
    Pearson's chi-square; pairs that are rarely expected count as one."""
    (other,) = {0, 1, 2} - set(dims)
    expected = exact().sum(other).flatten() * len(texts)
    found = torch.bincount(texts[:, dims[0]] * V + texts[:, dims[1]], minlength=V * V).double()
    if found[expected == 0].any():
        return 0.0
    often = expected >= 5
    expected, found = (torch.cat([x[often], x[~often].sum()[None]]) for x in (expected, found))
    far = ((found - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2).double(), far / 2))


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return drawn(None)


@pytest.mark.parametrize("dims", [(0, 1), (1, 2), (0, 2)])
def test_a_draw_without_guesses_is_the_model_s(plain: Tensor, dims: tuple[int, int]) -> None:
    assert chance(plain, dims) > LEAST


@pytest.mark.parametrize("name", PROPOSERS)
def test_guesses_leave_the_distribution_as_it_is(plain: Tensor, name: str) -> None:
    proposer = PROPOSERS[name]()
    texts = drawn(proposer)
    assert 0.02 < proposer.acceptance < 0.98
    for dims in ((0, 1), (1, 2), (0, 2)):
        assert chance(texts, dims) > LEAST
    # Not in distribution alone: a text is a function of its seed.
    assert torch.equal(texts, plain)


class Believing:
    """A sampler that takes a guess for the token in one of four places."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: Tensor, slots: list[int], written: list[int]) -> Tensor:
        ids = self.sampler(logits, slots, written)
        for n, (slot, place) in enumerate(zip(slots, written, strict=True)):
            guesses = self.sampler._row(slot).ids[place:]
            if guesses and n % 4 == 0:
                ids[n] = guesses[0]
        return ids


@pytest.mark.parametrize("name", ["ngram", "jacobi"])
def test_a_guess_that_is_taken_on_trust_is_noticed(name: str) -> None:
    texts = drawn(PROPOSERS[name](), Believing)
    assert min(chance(texts, (0, 1)), chance(texts, (1, 2))) < LEAST * 1e-6
