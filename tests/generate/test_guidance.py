"""Guided texts are transformers', and those of whole forwards, however they are scheduled."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.request import Request
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.speculative import DraftModel, Jacobi, NgramLookup, Proposer
from polyhead.models.model import TaskModel

transformers = pytest.importorskip("transformers")

V = 23
SMALL = EngineConfig(max_rows=12, cache_tokens=120, block_size=4, chunk=3, idle_chunk=5)
PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10, 11], [7], [3, 4, 5, 6, 7, 2, 2]]
NEGATIVE = [(), (5,), (3, 4, 5, 6, 9, 9, 1, 2, 8, 8, 8, 4)]


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4,
        bos_token_id=1, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.4, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`(theirs, ours)` of a kind."""

    @cache
    def pair(kind: str) -> tuple[Any, TaskModel]:
        torch.manual_seed(3)
        theirs = {"gpt2": gpt2, "llama": llama}[kind]().eval()
        folder: Path = tmp_path_factory.mktemp("model")
        theirs.save_pretrained(folder)
        return theirs, ph.load(folder)

    return pair


def written(request: Request) -> list[list[int]]:
    return [list(text.token_ids) for text in request.outcome()]


def run(
    model: TaskModel,
    asked: Sequence[tuple[list[int], GenerationConfig]],
    settings: EngineConfig = SMALL,
    proposer: Proposer | None = None,
) -> list[Request]:
    engine = Engine(model, None, settings, proposer)
    requests = [engine.add(prompt, config, ends=(0,)) for prompt, config in asked]
    engine.run()
    assert engine.memory.num_free_rows == settings.max_rows
    return requests


def guided(**named: Any) -> GenerationConfig:
    return GenerationConfig(**(dict(max_new_tokens=10, temperature=0.0) | named))


def derived(model: TaskModel, prompt: list[int], config: GenerationConfig, seed: int) -> list[int]:
    """Two whole forwards for every token, and the formula of Sanchez et al. 2023."""
    sampler = Sampler(1, 64, V, torch.device("cpu"))
    slot = sampler.open(config, prompt, seed, (0,))
    away, ids = list(config.negative_prompt_ids) or prompt[-1:], list[int]()
    for place in range(config.max_new_tokens):
        with torch.inference_mode():
            scores, other = (
                model(torch.tensor([[*start, *ids]]))[:, -1] for start in (prompt, away)
            )
        sampler.write(slot, 0, ids)
        if config.guidance_scale != 1:
            own, other = scores.log_softmax(-1), other.log_softmax(-1)
            scores = other + config.guidance_scale * (own - other)
        ids.append(int(sampler(scores, [slot], [place])))
        sampler.write(slot, place, ids[-1:])
        sampler.accept(slot, ids[-1:])
        if ids[-1] == 0:
            break
    return ids


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.5, 3.0])
def test_greedy_texts_are_those_of_transformers(models: Any, kind: str, scale: float) -> None:
    theirs, ours = models(kind)
    asked = [
        (prompt, guided(guidance_scale=scale, negative_prompt_ids=away))
        for prompt in PROMPTS
        for away in NEGATIVE
    ]
    for (prompt, config), request in zip(asked, run(ours, asked), strict=True):
        away = torch.tensor([config.negative_prompt_ids]) if config.negative_prompt_ids else None
        ids = torch.tensor([prompt])
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10,
            guidance_scale=scale, negative_prompt_ids=away,
        )  # fmt: skip
        assert written(request) == [found[0, len(prompt) :].tolist()]


WAYS: list[dict[str, Any]] = [
    dict(),
    dict(temperature=0.9, seed=1, num_return_sequences=3),
    dict(temperature=0.8, seed=2, top_p=0.9, repetition_penalty=1.4, no_repeat_ngram_size=3),
    dict(temperature=1.0, seed=3, mirostat=2, mirostat_tau=2.0),
    dict(temperature=1.0, seed=4, min_new_tokens=4, logit_bias={0: 3.0}, num_return_sequences=2),
]
PROPOSERS = {
    "nobody": lambda _: None,
    "lookup": lambda _: NgramLookup(3),
    "jacobi": lambda _: Jacobi(2),
    "draft": lambda model: DraftModel(model, 3),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("who", PROPOSERS)
def test_texts_are_those_of_whole_forwards(models: Any, kind: str, who: str) -> None:
    """In a batch of which only some are guided, too large for the cache, read in pieces."""
    _, model = models(kind)
    asked: list[tuple[list[int], GenerationConfig]] = []
    for number, own in enumerate(WAYS):
        way = dict(min_new_tokens=8) | own
        prompt, away = PROMPTS[number % 3], NEGATIVE[number % 2]
        asked.append((prompt, guided(**way, guidance_scale=1.7, negative_prompt_ids=away)))
        asked.append((prompt, guided(**way)))
    requests = run(model, asked, replace(SMALL, cache_tokens=72), PROPOSERS[who](model))
    assert sum(request.times_preempted for request in requests)
    for (prompt, config), request in zip(asked, requests, strict=True):
        copies = config.num_return_sequences
        seeds = row_seeds([config] * copies, [prompt] * copies, True)
        expected = [derived(model, prompt, config, seed) for seed in seeds]
        assert written(request) == expected
        assert len(request.done) == copies


@pytest.mark.parametrize("proposer", [NgramLookup(3), Jacobi(2)])
def test_guesses_are_kept_where_they_are_right(models: Any, proposer: Proposer) -> None:
    _, model = models("gpt2")
    config = guided(guidance_scale=1.5, max_new_tokens=40, suppress_tokens=(0,))
    alone = written(run(model, [(PROMPTS[0], config)])[0])
    read: list[int] = []
    hook = model.backbone.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    assert written(run(model, [(PROMPTS[0], config)], proposer=proposer)[0]) == alone
    hook.remove()
    assert proposer.accepted
    # Two for the prompt's pieces, one for the other prompt; then one for each token not guessed.
    assert len(read) - 3 <= 40 - proposer.accepted


def test_prefixes_of_both_prompts_are_found_again(models: Any) -> None:
    _, model = models("llama")
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=96, block_size=4))
    config = guided(guidance_scale=2.0, negative_prompt_ids=NEGATIVE[2])
    first = engine.add(PROMPTS[0], config, ends=(0,))
    engine.run()
    read = []
    hook = model.backbone.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    second = engine.add(PROMPTS[0], config, ends=(0,))
    engine.run()
    hook.remove()
    assert written(first) == written(second)
    assert (first.found, second.found) == (0, 8)
    assert sum(read) == len(PROMPTS[0]) - 8 + len(NEGATIVE[2]) - 8 + 2 * (
        len(written(first)[0]) - 1
    )


def test_a_text_that_is_cancelled_or_done_gives_back_both_rows(models: Any) -> None:
    _, model = models("gpt2")
    engine = Engine(model, None, EngineConfig(max_rows=6, cache_tokens=256, block_size=4))
    config = guided(guidance_scale=2.0, temperature=1.0, seed=1, num_return_sequences=3)
    request = engine.add(PROMPTS[0], config, ends=(0,))
    full = run(model, [(PROMPTS[0], config)])[0]
    for _ in range(4):
        engine.step()
    engine.cancel(request)
    assert engine.memory.num_free_rows == 6
    so_far = written(request)
    assert len(so_far) == 3
    assert max(map(len, so_far)) == 3
    assert all(own == all_[: len(own)] for own, all_ in zip(so_far, written(full), strict=True))
    assert {text.finish_reason for text in request.outcome()} <= {"cancelled", "stop"}


def test_logprobs_are_the_models_own(models: Any) -> None:
    _, model = models("gpt2")
    config = guided(guidance_scale=3.0, logprobs=2, negative_prompt_ids=(5, 6))
    (text,) = run(model, [(PROMPTS[0], config)])[0].outcome()
    ids = [*PROMPTS[0], *text.token_ids]
    with torch.inference_mode():
        rows = model(torch.tensor([ids]))[0, len(PROMPTS[0]) - 1 :].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(rows, text.token_ids, strict=False)]
    assert [each.logprob for each in text.logprobs] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("shapes", [{}, {"static": True}])
def test_texts_chats_and_streams_take_a_negative_prompt(tokenizer, shapes: Any) -> None:
    torch.manual_seed(0)
    model = ph.build("gpt2", vocab_size=tokenizer.vocab_size, d_model=16, num_layers=1,
                     num_heads=2, max_seq_len=64)  # fmt: skip
    generator = ph.TextGenerator(model, tokenizer, **shapes)
    long = "the lazy dog jumps over the quick brown fox and some more"
    config = guided(guidance_scale=2.5, negative_prompt=long)
    same = guided(guidance_scale=2.5, negative_prompt_ids=tokenizer.encode(long))
    other = guided(guidance_scale=2.5)
    found = generator.generate(
        ["hello", "hello", "hello", "hello"], [config, same, other, guided()]
    )
    assert found[0].token_ids == found[1].token_ids
    assert len({text.token_ids for text in found}) == 3
    stream = generator.stream("hello", config)
    assert "".join(stream) == found[0]
    engine = generator.own_engine(config)
    assert "".join(generator.stream("hello", config, engine=engine)) == found[0]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (dict(guidance_scale=2, num_beams=2), "is for texts that are greedy or drawn"),
        (dict(guidance_scale=2, penalty_alpha=0.5, top_k=3), "is for texts that are greedy"),
        (dict(negative_prompt="no"), "negative_prompt does nothing at guidance_scale=1"),
        (dict(negative_prompt_ids=[3]), "negative_prompt_ids does nothing"),
        (dict(guidance_scale=2, negative_prompt="a", negative_prompt_ids=[3]), "one of them"),
        (dict(guidance_scale=2, negative_prompt=5), "must be a text"),
    ],
)
def test_what_cannot_be_guided_is_one_line(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ph.ConfigError, match=why) as caught:
        guided(**said)
    assert "\n" not in str(caught.value)


def test_two_long_prompts_leave_room_for_what_both_take(models: Any) -> None:
    _, model = models("gpt2")
    long = [*range(2, 14)]
    config = guided(guidance_scale=2, negative_prompt_ids=long[::-1], suppress_tokens=(0,))
    settings = EngineConfig(max_rows=2, cache_tokens=32, block_size=4)
    (request,) = run(model, [(long, config)], settings)
    assert [len(ids) for ids in written(request)] == [4]
    assert not request.times_preempted


def test_what_does_not_fit_is_refused_at_once(models: Any) -> None:
    _, model = models("gpt2")
    engine = Engine(model, None, EngineConfig(max_rows=3, cache_tokens=16, block_size=4))
    with pytest.raises(ph.DataError, match="the negative prompt has 12 tokens and the cache"):
        engine.request([3], guided(guidance_scale=2, negative_prompt_ids=NEGATIVE[2]))
    with pytest.raises(ph.DataError, match="token id 99 is outside"):
        engine.request([3], guided(guidance_scale=2, negative_prompt_ids=[99]))
    with pytest.raises(ph.ConfigError, match="4 texts at once are more than max_rows=3; give"):
        engine.request([3], guided(guidance_scale=2, temperature=1, num_return_sequences=2))
    with pytest.raises(ph.ConfigError, match="for a prompt alone, and here are images"):
        engine.request([3], guided(guidance_scale=2), pixels=torch.zeros(1, 3, 2, 2))
    t5 = ph.build("t5", vocab_size=V, d_model=8, num_layers=1, num_heads=1, head_dim=8, d_ff=8)
    with pytest.raises(ph.ConfigError, match="and here are ids of a source"):
        Engine(t5, None).request([0], guided(guidance_scale=2), source=[3, 4])
