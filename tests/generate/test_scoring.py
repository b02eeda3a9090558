"""Continuations that are given: each token as likely as in one forward of the whole."""

import random
from functools import cache
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.request import Request
from polyhead.generate.speculative import NgramLookup
from polyhead.models.model import TaskModel

V = 50
SIZES: dict[str, Any] = dict(
    vocab_size=V, d_model=32, d_ff=48, num_layers=2, num_heads=4, max_seq_len=64
)
MODELS: dict[str, dict[str, Any]] = {"llama": SIZES, "mistral": SIZES | dict(window=6)}
ENGINES = {
    "roomy": EngineConfig(max_rows=32),
    "small": EngineConfig(max_rows=5, block_size=3, chunk=4, idle_chunk=11),
    "too few blocks": EngineConfig(max_rows=9, cache_tokens=64, block_size=2, chunk=8),
}
Asked = list[tuple[list[int], list[list[int]]]]


@cache
def made(name: str) -> TaskModel:
    return ph.build(name, seed=0, init_std=0.3, **MODELS[name]).eval()


def asked(seed: int = 0, most: int = 4) -> Asked:
    """Contexts, of which some begin alike, and what may follow each."""
    chance = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [chance.randrange(V) for _ in range(count)]

    starts = [ids(12), []]
    return [
        (
            [*chance.choice(starts), *ids(chance.randint(1, 9))],
            [ids(chance.randint(1, 9)) for _ in range(chance.randint(1, most))],
        )
        for _ in range(16)
    ]


def check(model: TaskModel, texts: Asked, requests: list[Request]) -> None:
    for (context, continuations), request in zip(texts, requests, strict=True):
        for ids, found in zip(continuations, request.outcome(), strict=True):
            with torch.inference_mode():
                logprobs = model(torch.tensor([[*context, *ids]]))[0].log_softmax(1)
            logprobs = logprobs[len(context) - 1 : -1]
            expected = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert found.token_ids == tuple(ids)
            assert found.logprobs is not None
            assert [token.logprob for token in found.logprobs] == pytest.approx(expected, abs=1e-5)
            likeliest = [token.top[0][0] for token in found.logprobs]
            assert likeliest == logprobs.argmax(1).tolist()


def nothing_is_held(engine: Engine) -> bool:
    pools = [tables.pool for tables in engine.memory.all_tables]
    return engine.memory.num_free_rows == engine.memory.max_rows and all(
        pool.num_free == pool.num_blocks - 1 for pool in pools
    )


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_a_continuation_is_as_likely_as_alone(name: str, settings: EngineConfig) -> None:
    model, texts = made(name), asked()
    engine = Engine(model, None, settings)
    requests = [engine.score(*text) for text in texts]
    engine.run()
    check(model, texts, requests)
    assert nothing_is_held(engine)


def test_it_goes_on_beside_texts_and_may_be_sent_back() -> None:
    model, texts = made("llama"), asked(1, most=2)
    settings = EngineConfig(max_rows=8, cache_tokens=64, block_size=2, chunk=8)
    engine = Engine(model, None, settings, NgramLookup(3))
    config = GenerationConfig(temperature=0.0, max_new_tokens=15)
    requests: list[Request] = []
    urgent: list[Request] = []
    for number, text in enumerate(texts):
        requests.append(engine.score(*text))
        engine.step()
        if number % 3 == 0:
            urgent.append(engine.add([number, 2, 3], config, priority=1))
    engine.run()
    check(model, texts, requests)
    assert any(request.times_preempted for request in requests)
    alone = Engine(model, None)
    expected = [alone.add(request.prompt, config) for request in urgent]
    alone.run()
    assert [r.outcome()[0].token_ids for r in urgent] == [
        r.outcome()[0].token_ids for r in expected
    ]
    assert nothing_is_held(engine)


def test_a_context_is_read_once_and_its_continuations_at_once() -> None:
    model = made("llama")
    read: list[tuple[int, ...]] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, x: read.append(tuple(x[0].shape)))
    engine = Engine(model, None)
    engine.score(range(20), [[1, 2, 3], [4, 5, 6], [7]])
    engine.run()
    engine.score([9], [list(range(30))])
    engine.run()
    hook.remove()
    assert read == [(1, 20), (2, 2), (1, 30)]


def test_it_may_be_cancelled() -> None:
    engine = Engine(made("llama"), None)
    request = engine.score([1, 2, 3], [[4, 5, 6], [7, 8]])
    engine.step()
    engine.cancel(request)
    engine.run()
    assert request.is_finished
    assert nothing_is_held(engine)


def test_logits_that_are_no_numbers_end_one_request() -> None:
    model = ph.build("bigram", vocab_size=V, d_model=16).eval()
    with torch.no_grad():
        model.backbone.embedding.weight[7] = float("nan")
    engine = Engine(model, None)
    bad, good = engine.score([7], [[1, 2], [3]]), engine.score([8], [[1, 2]])
    engine.run()
    with pytest.raises(DataError, match="not finite after 1 tokens"):
        bad.outcome()
    assert len(good.outcome()) == 1
    assert nothing_is_held(engine)


@pytest.mark.parametrize(
    ("context", "continuations", "error", "why"),
    [
        ([1], [], DataError, "no continuation; give at least one"),
        ([1], [[2], []], DataError, "continuation 1 has no tokens"),
        ([1], [[V]], DataError, "outside the model's vocabulary"),
        ([1] * 60, [[1] * 6], DataError, "60 tokens leaves room for 5 and a continuation has 6"),
        ([1], [[1]] * 17, ConfigError, "17 texts at once are more than max_rows=16; give"),
    ],
)
def test_what_cannot_be_scored(
    context: list[int], continuations: list[list[int]], error: Any, why: str
) -> None:
    with pytest.raises(error, match=why):
        Engine(made("llama"), None).score(context, continuations)
