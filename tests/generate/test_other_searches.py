"""Searches that transformers dropped, beside small derivations by whole forwards."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.models.model import TaskModel

V = 29
PROMPTS = [[3, 4, 5, 6], [7], [8, 9, 1, 2, 11, 13, 12]]


def made(family: str, seed: int) -> TaskModel:
    sizes: dict[str, Any] = dict(d_model=32, num_layers=2, num_heads=4, max_seq_len=48)
    if family == "llama":
        sizes["d_ff"] = 48
    return shaken(ph.build(family, seed=seed, vocab_size=V, **sizes).eval(), 0.3, seed)


def found(model: TaskModel, config: GenerationConfig, ends: tuple[int, ...] = ()) -> list[Any]:
    """By an engine with too little room for all prompts at once, read in pieces."""
    settings = EngineConfig(max_rows=7, cache_tokens=160, block_size=4, chunk=3, idle_chunk=5)
    engine = Engine(model, None, settings)
    requests = [engine.add(prompt, config, ends=ends) for prompt in PROMPTS]
    engine.run()
    return [
        [(text.token_ids, text.score) for text in request.results or ()] for request in requests
    ]


def states(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.backbone(torch.tensor([ids]))[0]


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.head(states(model, ids)[-1]).log_softmax(-1)


def contrasted(
    model: Any, prompt: list[int], k: int, alpha: float, length: int, ends: tuple[int, ...]
) -> tuple[int, ...]:
    """Equation 5 of Su et al. 2022, a forward for every candidate."""
    ids = list(prompt)
    for _ in range(length):
        likely = logprobs(model, ids).exp().topk(k)
        scores: list[float] = []
        for chance, token in zip(likely.values, likely.indices.tolist(), strict=True):
            *before, own = F.normalize(states(model, [*ids, token]), dim=-1)
            likeness = max(float(own @ other) for other in before)
            scores.append((1 - alpha) * float(chance) - alpha * likeness)
        ids.append(int(likely.indices[scores.index(max(scores))]))
        if ids[-1] in ends:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("k", "alpha"), [(2, 0.2), (5, 0.6), (7, 0.9)])
def test_contrastive_search(family: str, k: int, alpha: float) -> None:
    model = made(family, k)
    config = GenerationConfig(temperature=0, top_k=k, penalty_alpha=alpha, max_new_tokens=12)
    for ends in ((), (1, 2, 3, 4)):
        expected = [contrasted(model, prompt, k, alpha, 12, ends) for prompt in PROMPTS]
        assert [texts[0][0] for texts in found(model, config, ends)] == expected


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_contrastive_search_goes_on_after_it_was_sent_back(steps: int) -> None:
    model, prompt = made("llama", 3), [*range(1, 15)]
    config = GenerationConfig(temperature=0, top_k=3, penalty_alpha=0.6, max_new_tokens=8)
    settings = EngineConfig(max_rows=6, cache_tokens=64, block_size=4, chunk=64, idle_chunk=5)
    engine = Engine(model, None, settings)
    request = engine.add(prompt, config)
    for _ in range(steps):
        engine.step()
    engine.add([5] * 30, GenerationConfig(temperature=0, max_new_tokens=6), priority=1)
    engine.run()
    assert request.times_preempted == 1
    assert request.outcome()[0].token_ids == contrasted(model, prompt, 3, 0.6, 8, ())


def diverse(
    model: Any, prompt: list[int], groups: int, size: int, penalty: float, length: int, power: float
) -> list[tuple[tuple[int, ...], float]]:
    """Beams of groups, one group after the other at each place, none of which ends early."""
    beams = [[((), 0.0)] for _ in range(groups)]
    for _ in range(length):
        said = torch.zeros(V)
        for group in range(groups):
            following: list[tuple[float, tuple[int, ...]]] = []
            for ids, score in beams[group]:
                scores = logprobs(model, [*prompt, *ids]) - penalty * said + score
                following += [(float(scores[token]), (*ids, token)) for token in range(V)]
            best = sorted(following, reverse=True)[:size]
            beams[group] = [(ids, score) for score, ids in best]
            for _, ids in best:
                said[ids[-1]] += 1
    texts = [(ids, score / length**power) for group in beams for ids, score in group]
    return sorted(texts, key=lambda text: -text[1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("groups", "size", "penalty", "power"), [(2, 1, 0.5, 1.0), (3, 2, 2.0, 0.0), (2, 3, 0.3, 2.0)]
)
def test_diverse_beams(family: str, groups: int, size: int, penalty: float, power: float) -> None:
    model = made(family, groups * size)
    config = GenerationConfig(
        temperature=0, num_beams=groups * size, num_beam_groups=groups, diversity_penalty=penalty,
        length_penalty=power, max_new_tokens=8, num_return_sequences=groups * size,
    )  # fmt: skip
    for prompt, texts in zip(PROMPTS, found(model, config), strict=True):
        expected = diverse(model, prompt, groups, size, penalty, 8, power)
        assert [ids for ids, _ in texts] == [ids for ids, _ in expected]
        for (_, score), (_, other) in zip(texts, expected, strict=True):
            assert score == pytest.approx(other, abs=1e-4)


def test_groups_that_do_not_avoid_each_other_say_the_same() -> None:
    model = made("gpt2", 5)
    both: dict[str, Any] = dict(temperature=0, max_new_tokens=9)
    alone = found(model, GenerationConfig(num_beams=2, num_return_sequences=2, **both), (1, 2, 3))
    groups = dict(num_beams=6, num_beam_groups=3, num_return_sequences=6)
    config = GenerationConfig(**groups, diversity_penalty=0.0, **both)
    for texts, plain in zip(found(model, config, (1, 2, 3)), alone, strict=True):
        assert [ids for ids, _ in texts] == [ids for ids, _ in plain for _ in range(3)]


def test_the_likeliest_of_those_drawn_is_returned() -> None:
    model = made("llama", 3)
    config = GenerationConfig(seed=2, best_of=6, num_return_sequences=2, max_new_tokens=7)
    for prompt, texts in zip(PROMPTS, found(model, config), strict=True):
        assert len(texts) == 2
        for ids, score in texts:
            each = [
                float(logprobs(model, [*prompt, *ids[:place]])[token])
                for place, token in enumerate(ids)
            ]
            assert score == pytest.approx(sum(each) / len(each), abs=1e-4)
        assert texts[0][1] >= texts[1][1]


def test_candidates_that_fill_the_cache_come_back_to_it() -> None:
    engine = Engine(made("llama", 0), None, EngineConfig(max_rows=3, cache_tokens=24, block_size=2))
    config = GenerationConfig(temperature=0.0, penalty_alpha=0.6, top_k=3, max_new_tokens=5)
    prompt = list(range(1, 20))
    request = engine.add(prompt, config)
    assert request.limit == 1
    engine.step()
    assert [len(text.ids) for text in request.texts] == [20] * 3
    engine.add(prompt[:17], GenerationConfig(max_new_tokens=2), priority=1)
    engine.run()
    assert request.times_preempted == 1
    (found,) = request.outcome()
    assert len(found.token_ids) == 1
