"""Many requests at once: each gives what it gives alone, and leaves nothing behind."""

import random
import threading
from typing import Any

import pytest
import torch
from tests.nn.parts import Keeps, shaken
from torch import Tensor

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.front import EngineThread
from polyhead.generate.request import Request
from polyhead.generate.runner import Piece
from polyhead.generate.speculative import DraftModel, Jacobi, NgramLookup, Proposer, first_layers
from polyhead.kernels.native import library
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention

V = 61
SIZES: dict[str, Any] = dict(vocab_size=V, d_model=32, num_layers=2, num_heads=4, max_seq_len=96)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", SIZES),
    "llama": ("llama", SIZES | dict(d_ff=48, num_kv_heads=2)),
    "windows": ("mistral", SIZES | dict(d_ff=48, window=7)),
    "mixed": (
        "qwen2",
        SIZES | dict(
            d_ff=48, num_layers=4, window=9, use_window=True,
            layer_types=("sliding_attention", "full_attention") * 2,
        ),
    ),
    "mixtral": ("mixtral", SIZES | dict(d_ff=32, num_experts=4)),
    "bigram": ("bigram", dict(vocab_size=V, d_model=16)),
    "window_mlp": ("window_mlp", dict(vocab_size=V, d_model=32, window=5)),
    "lstm": ("lstm", dict(vocab_size=V, d_model=32, num_layers=2)),
}  # fmt: skip
SOURCED: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", dict(vocab_size=V, d_model=32, d_ff=32, num_layers=1, num_heads=4))
}
ENGINES = {
    "roomy": EngineConfig(chunk=256),
    "small blocks": EngineConfig(max_rows=5, block_size=3, chunk=4, idle_chunk=11),
    "too few blocks": EngineConfig(max_rows=6, cache_tokens=96, block_size=4, chunk=8),
}


def made(name: str, seed: int = 0, **changes: Any) -> TaskModel:
    family, fields = (MODELS | SOURCED)[name]
    return shaken(ph.build(family, seed=seed, **fields | changes).eval(), 0.2, seed)


def drawn_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(V) for _ in range(chance.randint(1, longest))] for _ in range(count)]


def greedy(**named: Any) -> GenerationConfig:
    return GenerationConfig(**dict(temperature=0.0, max_new_tokens=20) | named)


def alone(model: TaskModel, prompts: list[list[int]], length: int = 20) -> list[tuple[int, ...]]:
    """Greedy tokens without any cache: a forward over all for each."""
    found: list[tuple[int, ...]] = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(min(length, getattr(model.config, "max_seq_len", 999) - len(prompt))):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            found.append(tuple(ids[len(prompt) :]))
    return found


def written(requests: list[Request]) -> list[tuple[int, ...]]:
    return [request.results[0].token_ids for request in requests if request.results]


def nothing_is_held(engine: Engine) -> bool:
    memory = engine.memory
    pools = [tables.pool for tables in memory.all_tables]
    return memory.num_free_rows == memory.max_rows and all(
        pool.num_free == pool.num_blocks - 1 and not any(pool.holders) for pool in pools
    )


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_together_as_alone(name: str, settings: EngineConfig) -> None:
    model, prompts = made(name), drawn_prompts(14)
    engine = Engine(model, None, settings)
    requests = [engine.add(prompt, greedy()) for prompt in prompts]
    engine.run()
    assert written(requests) == alone(model, prompts)
    assert nothing_is_held(engine)
    if settings.cache_tokens and "full" in str(engine.memory.kinds) and name in ("gpt2", "llama"):
        assert any(request.times_preempted for request in requests)


def test_requests_come_and_go_at_any_step() -> None:
    model, prompts = made("llama"), drawn_prompts(20, seed=3)
    engine = Engine(model, None, EngineConfig(max_rows=4, block_size=4, chunk=6))
    requests: list[Request] = []
    while len(requests) < len(prompts) or engine.has_work:
        if len(requests) < len(prompts):
            requests.append(engine.add(prompts[len(requests)], greedy()))
        engine.step()
    assert written(requests) == alone(model, prompts)


class Reads:
    """Counts the tokens that a model is given."""

    def __init__(self, model: Any) -> None:
        self.steps: list[int] = []
        model.backbone.embedding.register_forward_pre_hook(self)

    def __call__(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        self.steps.append(given[0].numel())


def test_what_prompts_share_is_read_once() -> None:
    model = made("llama")
    reads = Reads(model)
    engine = Engine(model, None, EngineConfig(block_size=4))
    prompts = [[*range(48), 50 + i] for i in range(8)]
    together = [engine.add(prompt, greedy(max_new_tokens=1)) for prompt in prompts]
    engine.run()
    assert sum(reads.steps) == 49 + 7
    assert sorted(request.found for request in together) == [0] + [48] * 7
    later = engine.add([*range(48), 60], greedy(max_new_tokens=1))
    engine.run()
    assert (later.found, sum(reads.steps)) == (48, 49 + 7 + 1)
    assert written([*together, later]) == alone(model, [*prompts, [*range(48), 60]], 1)


def test_an_answer_is_found_by_the_next_question() -> None:
    model = made("mixed")
    engine = Engine(model, None, EngineConfig(block_size=4))
    first = engine.add(list(range(11)), greedy(max_new_tokens=14))
    engine.run()
    ids = [*range(11), *written([first])[0], 5, 6, 7]
    second = engine.add(ids, greedy())
    engine.run()
    assert second.found == 24
    assert written([second]) == alone(model, [ids])


def test_prompts_are_read_in_chunks_while_others_go_on() -> None:
    model = made("llama")
    reads = Reads(model)
    engine = Engine(model, None, EngineConfig(block_size=4, chunk=8))
    engine.add([1, 2], greedy(max_new_tokens=30))
    engine.step()
    long = engine.add(list(range(50)), greedy(max_new_tokens=1))
    reads.steps.clear()
    steps = 0
    while not long.is_finished:
        before = len(reads.steps)
        engine.step()
        (both,) = reads.steps[before:]  # one forward reads them all
        assert both <= 1 + 8
        steps += 1
    assert steps == 7  # 50 tokens by eights


PIECES = ((0, 5), (9, 1), (14, 1), (0, 3), (22, 6), (3, 2), (17, 6), (9, 2))


def states(engine: Engine, pieces: list[Piece]) -> dict[tuple[int, int], Tensor]:
    """By what a piece's text holds, and the piece's length."""
    with torch.inference_mode():
        read = engine.runner.read(pieces)
    return {(piece.text.held, len(piece.ids)): found for piece, found in read}


def begun(engine: Engine, held: int, length: int) -> Piece:
    """A text that holds so many tokens, and has so many to read."""
    ids = [(7 * i + length) % V for i in range(held + length)]
    (text,) = engine.request(ids, greedy()).texts
    text.row = engine.memory.open()
    engine.memory.make_room([(text.row, 0, held + length)])
    if held:
        states(engine, [Piece(text, ids[:held], 0)])
    text.held = held
    return Piece(text, ids[held:], length)


@pytest.mark.parametrize("kv", ["model", "fp16", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "windows", "mixed", "mixtral", "dynamic"])
def test_pieces_of_all_lengths_are_read_at_once_as_by_themselves(name: str, kv: str) -> None:
    changes = dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)) if name == "dynamic" else {}
    model = made("llama" if changes else name, **changes)
    engines = [Engine(model, None, EngineConfig(block_size=4, kv=kv)) for _ in "ab"]
    first, second = ([begun(engine, *piece) for piece in PIECES] for engine in engines)
    reads = Reads(model)
    together = states(engines[0], first)
    if not changes:
        assert len(reads.steps) == 1
    assert together.keys() == set(PIECES)
    for piece in second:
        for which, expected in states(engines[1], [piece]).items():
            # A last bit may move a number to the next half.
            near = 1e-3 if kv == "fp16" else 2e-5
            torch.testing.assert_close(together[which], expected, atol=near, rtol=1e-4)


def test_who_looks_at_weights_sees_those_of_all_pieces() -> None:
    model = made("llama")
    seen: list[Tensor] = []
    attention = next(part for part in model.modules() if isinstance(part, MultiHeadAttention))
    attention.probes.append(Keeps(seen))
    prompts = drawn_prompts(6)
    engine = Engine(model, None, ENGINES["small blocks"])
    requests = [engine.add(prompt, greedy()) for prompt in prompts]
    engine.run()
    assert seen
    attention.probes.clear()
    assert written(requests) == alone(model, prompts)


def test_a_window_gives_back_what_it_leaves_behind() -> None:
    model = made("windows", max_seq_len=96)
    engine = Engine(model, None, EngineConfig(max_rows=2, block_size=4))
    request = engine.add([3, 4, 5], greedy(max_new_tokens=80))
    (tables,) = engine.memory.kinds.values()
    most = 0
    while not request.is_finished:
        engine.step()
        most = max(most, tables.pool.num_blocks - 1 - tables.pool.num_free)
        held = [b for b in tables.pool.holders if b]
        assert len(held) <= 4
    assert written([request]) == alone(model, [[3, 4, 5]], 80)


@pytest.mark.parametrize("when", ["waiting", "reading", "writing", "sent back", "done"])
def test_a_request_may_be_cancelled_at_any_time(when: str) -> None:
    model = made("gpt2")
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=96, block_size=4, chunk=5))
    others = [engine.add(prompt, greedy()) for prompt in ([1, 2, 3], [4, 5])]
    if when == "waiting":
        request = engine.add([7] * 9, greedy())
    elif when == "sent back":
        engine = Engine(
            model, None, EngineConfig(max_rows=3, cache_tokens=48, block_size=4, chunk=5)
        )
        others = [engine.add(prompt, greedy()) for prompt in ([1, 2, 3], [4, 5])]
        request = engine.add([7] * 9, greedy())
        while not request.times_preempted:
            engine.step()
    else:
        engine.run()
        request = engine.add([7] * 29, greedy())
        others.append(engine.add([8, 9], greedy()))
        engine.step()
        while when == "writing" and len(request.texts[0].ids) < 33:
            engine.step()
        if when == "done":
            engine.run()
    so_far = tuple(request.texts[0].ids[len(request.prompt) :]) if request.texts else ()
    engine.cancel(request)
    engine.cancel(request)
    assert request.is_finished
    engine.run()
    assert nothing_is_held(engine)
    expected = alone(model, [request.prompt])[0]
    (result,) = request.results or ()
    if when == "done":
        assert (result.token_ids, result.finish_reason) == (expected, "length")
    else:
        assert (result.token_ids, result.finish_reason) == (so_far, "cancelled")
        assert expected[: len(so_far)] == so_far
    assert written(others) == alone(model, [other.prompt for other in others])


def test_ten_times_more_requests_than_blocks() -> None:
    model, prompts = made("llama"), drawn_prompts(60, seed=5, longest=12)
    engine = Engine(model, None, EngineConfig(max_rows=8, cache_tokens=40, block_size=4, chunk=8))
    requests = [engine.add(prompt, greedy(max_new_tokens=9)) for prompt in prompts]
    engine.run()
    assert written(requests) == alone(model, prompts, 9)
    assert nothing_is_held(engine)


def test_what_does_not_fit_is_said_at_once() -> None:
    model = made("gpt2")
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=32))
    with pytest.raises(DataError, match="40 tokens and the cache holds 32; shorten it, or give"):
        engine.add([1] * 40, greedy())
    with pytest.raises(DataError, match="97 tokens and the model takes 96"):
        engine.add([1] * 97, greedy())
    with pytest.raises(ConfigError, match="3 texts at once are more than max_rows=2; give"):
        engine.add([1], GenerationConfig(num_return_sequences=3))
    with pytest.raises(DataError, match="token id 61 is outside"):
        engine.add([61], greedy())
    with pytest.raises(ConfigError, match="gpt2 reads no source"):
        engine.add([1], greedy(), source=[2])
    # What fits by its prompt alone ends where the cache does.
    request = engine.add([1] * 30, greedy())
    engine.run()
    assert len(written([request])[0]) == 2
    assert not engine.has_work


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (dict(max_rows=0), "max_rows=0 must be 1 or more"),
        (dict(chunk=0), "chunk=0 must be 1 or more"),
        (dict(stretch=1), "stretch=1 must be above 1"),
        (dict(cache_tokens=1), "cache_tokens=1 must be 2 or more"),
        (dict(kv="int3"), "kv='int3' must be"),
    ],
)
def test_settings_that_cannot_be(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EngineConfig(**said)


def test_a_higher_priority_goes_first() -> None:
    engine = Engine(made("gpt2"), None, EngineConfig(max_rows=1))
    low = [engine.add([1, 2], greedy(max_new_tokens=4)) for _ in range(3)]
    engine.step()
    high = engine.add([3], greedy(max_new_tokens=4), priority=1)
    done: list[Request] = []
    while engine.has_work:
        done += engine.step()
    # The one that had begun was sent back, and is as it would have been.
    assert done == [high, *low]
    assert low[0].times_preempted == 1
    assert written(low)[0] == written(low)[1]


def test_clients_share_alike() -> None:
    engine = Engine(made("gpt2"), None, EngineConfig(max_rows=1))
    many = [engine.add([1, 2], greedy(max_new_tokens=6), client="many") for _ in range(8)]
    engine.step()
    few = [engine.add([3, 4], greedy(max_new_tokens=6), client="few") for _ in range(2)]
    done: list[Request] = []
    while engine.has_work:
        done += engine.step()
    assert max(done.index(request) for request in few) <= 4
    assert [request for request in done if request in many] == many


@pytest.mark.parametrize(
    # A byte a number has a scale a vector of 8.
    ("kv", "near", "size"),
    [("fp16", 2e-3, 1 / 2), ("int8", 0.1, (8 + 4) / (8 * 4))],
)
def test_keys_and_values_in_fewer_bits_are_near(kv: str, near: float, size: float) -> None:
    model, prompts = made("llama"), drawn_prompts(6, seed=9)
    exact, small = (Engine(model, None, EngineConfig(kv=kind)) for kind in ("model", kv))
    config = greedy(max_new_tokens=1, logprobs=5)
    found = [[engine.add(prompt, config) for prompt in prompts] for engine in (exact, small)]
    exact.run()
    small.run()
    for one, two in zip(*found, strict=True):
        for a, b in zip(
            one.results[0].logprobs[0].top, two.results[0].logprobs[0].top, strict=True
        ):
            assert abs(a[1] - b[1]) < near
    sizes = [
        sum(
            layer.k_pages.num_bytes()
            for tables in e.memory.kinds.values()
            for layer in tables.layers
        )
        for e in (exact, small)
    ]
    assert sizes[1] == sizes[0] * size
    alike = [Engine(model, None, EngineConfig(kv=kv, **more)) for more in (
        {}, dict(block_size=4, chunk=3, idle_chunk=5),
    )]  # fmt: skip
    tokens = []
    for engine in alike:
        requests = [engine.add(prompt, greedy()) for prompt in prompts]
        engine.run()
        tokens.append(written(requests))
    assert tokens[0] == tokens[1]


PROPOSERS: dict[str, Any] = {
    "ngram": lambda model: NgramLookup(6),
    "jacobi": lambda model: Jacobi(3),
    "draft": lambda model: DraftModel(made("gpt2", seed=1), 3),
    "itself": lambda model: DraftModel(model, 4),
    "early exit": lambda model: DraftModel(first_layers(model, 1), 3),
}


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("name", ["llama", "mixed"])
@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
def test_guesses_change_nothing(proposer: str, name: str, settings: EngineConfig) -> None:
    model, prompts = made(name), drawn_prompts(9, seed=2)
    guessing: Proposer = PROPOSERS[proposer](model)
    engine = Engine(model, None, settings, guessing)
    requests = [engine.add(prompt, greedy()) for prompt in prompts]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert written(requests) == alone(model, prompts)
    assert nothing_is_held(engine)
    if proposer == "itself" and settings == ENGINES["roomy"]:
        assert guessing.acceptance == 1.0
        assert steps <= 9  # a token and four guesses each, twenty in all, after the prompts
    if isinstance(guessing, DraftModel):
        assert guessing.memory.num_free_rows == guessing.memory.max_rows


def test_a_text_that_quotes_is_guessed() -> None:
    model = made("bigram")
    guessing = NgramLookup(8)
    engine = Engine(model, None, None, guessing)
    request = engine.add([5], greedy(max_new_tokens=200))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    # A bigram's greedy text runs in a circle.
    assert written([request]) == alone(model, [[5]], 200)
    assert steps < 110
    assert guessing.acceptance > 0.7


def test_copies_of_a_prompt_share_it() -> None:
    model = made("llama")
    reads = Reads(model)
    engine = Engine(model, None, EngineConfig(block_size=4))
    request = engine.add(
        list(range(30)), GenerationConfig(seed=1, max_new_tokens=12, num_return_sequences=5)
    )
    engine.run()
    assert reads.steps[0] == 30
    assert set(reads.steps[1:]) == {5}
    texts = [result.token_ids for result in request.results or ()]
    assert len(texts) == len(set(texts)) == 5
    assert nothing_is_held(engine)


def test_threads_may_ask() -> None:
    model, prompts = made("llama"), drawn_prompts(24, seed=8)
    expected = alone(model, prompts)
    found: dict[int, tuple[int, ...]] = {}
    with EngineThread(Engine(model, None, EngineConfig(max_rows=6, block_size=4))) as front:

        def ask(number: int) -> None:
            (result,) = front.submit(prompts[number], greedy()).results(timeout=60)
            found[number] = result.token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        # One that nobody reads, and one that is left alone half way, hold nobody up.
        front.submit([1, 2], greedy(max_new_tokens=90))
        left = front.submit([3, 4], greedy(max_new_tokens=90))
        left.cancel()
        for thread in threads:
            thread.join()
        with pytest.raises(DataError, match="outside"):
            front.submit([99], greedy())
    assert [found[i] for i in range(len(prompts))] == expected
    assert left.request.is_finished
    with pytest.raises(ConfigError, match="closed"):
        front.submit([1], greedy())


def test_an_error_in_a_step_ends_those_at_work_alone() -> None:
    model = made("gpt2")
    with EngineThread(Engine(model, None, EngineConfig(max_rows=1))) as front:
        hook = model.backbone.register_forward_pre_hook(lambda *_: 1 / 0)
        handle = front.submit([1, 2], greedy())
        with pytest.raises(ZeroDivisionError):
            handle.results(timeout=60)
        hook.remove()
        (result,) = front.submit([1, 2], greedy()).results(timeout=60)
    assert result.token_ids == alone(model, [[1, 2]])[0]


def test_logits_that_are_no_numbers_end_one_request() -> None:
    model = made("bigram")
    with torch.no_grad():
        model.backbone.embedding.weight[7] = float("nan")
    engine = Engine(model, None)
    bad, good = engine.add([7], greedy()), engine.add([8], greedy(max_new_tokens=1))
    engine.run()
    assert isinstance(bad.error, DataError)
    assert "not finite after 1 tokens" in str(bad.error)
    assert good.results
    assert nothing_is_held(engine)


def test_sources_are_looked_over() -> None:
    engine = Engine(made("t5"), None, EngineConfig(max_rows=2, cache_tokens=64, source_tokens=32))
    for source, why in (
        ([], "t5 reads a source first"), ([1] * 33, "33 tokens and the cache holds 32"),
        ([V], "outside the model's vocabulary"),
    ):  # fmt: skip
        with pytest.raises(ph.PolyheadError, match=why):
            engine.add([0], greedy(), source=source)
    requests = [engine.add([0], greedy(max_new_tokens=4), source=[i] * 20) for i in range(1, 6)]
    engine.run()
    assert [len(text) for text in written(requests)] == [4] * 5
    assert nothing_is_held(engine)


def test_copies_of_a_text_share_its_source_when_they_come_back() -> None:
    engine = Engine(made("t5"), None, EngineConfig(max_rows=3, source_tokens=32))
    drawn = GenerationConfig(num_return_sequences=3, max_new_tokens=12, seed=1, ignore_eos=True)
    source = [i % V for i in range(32)]
    alone = engine.add([0], drawn, source=source)
    engine.run()
    request = engine.add([0], drawn, source=source)
    for _ in range(4):
        engine.step()
    engine.add([0], greedy(max_new_tokens=2), source=source, priority=1)
    engine.run()
    assert request.times_preempted == 1
    assert request.outcome() == alone.outcome()
    assert nothing_is_held(engine)


def test_clients_that_are_gone_are_forgotten() -> None:
    engine = Engine(made("bigram"), None)
    for number in range(500):
        engine.add([1], greedy(max_new_tokens=1), client=str(number))
        engine.run()
    assert len(engine.scheduler.had) < 100


def test_a_model_without_a_stack_of_layers_has_no_first_ones() -> None:
    with pytest.raises(ConfigError, match="lstm is not one stack of layers"):
        first_layers(made("lstm"), 1)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_equal_requests_are_answered_alike_from_the_first_on(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(vocab_size=256, d_model=64, num_layers=3, num_heads=4, d_ff=128, init_std=0.3)
    model = ph.pack(ph.quantize(ph.build("llama", seed=0, **sizes), method))
    config = ph.GenerationConfig(temperature=0, max_new_tokens=8, logprobs=0, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(max_rows=4))
    engine.prepare()
    if library("step") is None or not torch.cpu._is_vnni_supported():
        pytest.skip("steps in few bits are recorded with g++ and for VNNI")
    told: list[list[float]] = []
    for _ in range(5):
        request = engine.add([5, 9, 7, 3], config)
        while engine.has_work:
            engine.step()
        told.append([each.logprob for each in request.outcome()[0].logprobs or ()])
        # What was read once is read by what was recorded of it.
        monkeypatch.setattr(type(model.backbone), "forward", None)
    assert told == [told[0]] * 5
