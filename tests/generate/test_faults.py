"""What goes wrong with one request, its reader or its thread stays its own affair."""

import threading
from typing import Any

import pytest
import torch
from tests.generate.test_engine import V, alone, drawn_prompts, greedy, made, nothing_is_held

from polyhead.errors import ConfigError, DataError
from polyhead.generate.chat import Chat
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.front import EngineThread
from polyhead.generate.generator import TextGenerator
from polyhead.generate.speculative import NgramLookup
from polyhead.text.tokenizer import Tokenizer

PROMPTS = drawn_prompts(3)
SEARCHES: dict[str, dict[str, Any]] = {
    "beams": dict(num_beams=3),
    "groups": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "contrastive": dict(penalty_alpha=0.5, top_k=3),
}
LATE = SEARCHES | {"best of several": dict(best_of=3, temperature=1.0, seed=3)}


def words(**more: Any) -> Tokenizer:
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    return Tokenizer.train(["the quick brown fox"], vocab_size=300, special_tokens=special, **more)


@pytest.mark.parametrize("name", ["logit_bias", "forced_bos_token_id", "bad_words_ids"])
def test_tokens_that_the_head_lacks_are_refused_at_the_door(name: str) -> None:
    value = {"logit_bias": {V: 1.0}, "forced_bos_token_id": V, "bad_words_ids": [[V]]}[name]
    engine = Engine(made("gpt2"), None)
    with pytest.raises(ConfigError, match=f"{name} names token {V}"):
        engine.add(PROMPTS[0], GenerationConfig(**{name: value}))
    assert not engine.has_work


def test_ends_that_the_head_lacks_are_not_looked_for() -> None:
    model = made("gpt2")
    engine = Engine(model, None)
    ends = dict(stop_token_ids=[V + 9], exponential_decay_length_penalty=(1, 1.5))
    request = engine.add(PROMPTS[0], greedy(min_new_tokens=3, **ends))
    engine.run()
    assert request.outcome()[0].token_ids == alone(model, PROMPTS[:1])[0]


def test_a_text_may_be_sent_back_beneath_any_number_of_others() -> None:
    model = made("llama")
    engine = Engine(model, None, EngineConfig(max_rows=1))
    requests = []
    for priority in range(11):
        config = GenerationConfig(seed=priority, max_new_tokens=6, repetition_penalty=1.2)
        requests.append(engine.add(PROMPTS[priority % 3], config, priority=priority))
        engine.step()
    engine.run()
    for request in requests:
        other = Engine(model, None)
        single = other.add(request.prompt, request.config)
        other.run()
        assert request.outcome()[0].token_ids == single.outcome()[0].token_ids
    assert requests[0].times_preempted
    assert nothing_is_held(engine)


def test_a_reader_that_raises_ends_its_own_request() -> None:
    model, tokens = made("llama", vocab_size=300), words()
    engine = Engine(model, tokens, EngineConfig(max_rows=4))
    free = greedy(ignore_eos=True)
    first = engine.add(PROMPTS[0], free)
    bad = engine.add(PROMPTS[1], free, on_text=lambda _: 1 / 0)
    last = engine.add(PROMPTS[2], free)
    engine.run()
    with pytest.raises(ZeroDivisionError):
        bad.outcome()
    assert len(first.outcome()[0].token_ids) == len(last.outcome()[0].token_ids) == 20
    assert nothing_is_held(engine)


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_reader_may_cancel_a_search(kind: str) -> None:
    model, tokens = made("llama", vocab_size=300), words()
    engine = Engine(model, tokens, EngineConfig(max_rows=9))
    said: list[str] = []

    def hear(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            engine.cancel(search)

    request = engine.add(PROMPTS[0], greedy(ignore_eos=True), on_text=hear)
    search = engine.add(PROMPTS[1], greedy(**SEARCHES[kind]))
    engine.run()
    assert search.outcome()[0].finish_reason == "cancelled"
    assert len(request.outcome()[0].token_ids) == 20
    assert nothing_is_held(engine)


def test_nobody_guesses_for_a_recurrent_model() -> None:
    with pytest.raises(ConfigError, match=r"lstm cannot go back .* leave the proposer out"):
        Engine(made("lstm"), None, proposer=NgramLookup())


def test_requests_enter_once() -> None:
    engine = Engine(made("gpt2"), None)
    request, cancelled = (engine.request(PROMPTS[0], greedy()) for _ in range(2))
    engine.cancel(cancelled)
    engine.enter(cancelled)
    assert not engine.has_work
    assert cancelled.outcome()[0].finish_reason == "cancelled"
    engine.enter(request)
    with pytest.raises(ConfigError, match="entered before"):
        engine.enter(request)
    engine.run()
    assert len(request.outcome()[0].token_ids) == 20


@pytest.mark.parametrize("kind", LATE)
def test_logits_that_are_no_numbers_end_a_search(kind: str) -> None:
    model = made("bigram")
    with torch.no_grad():
        model.backbone.embedding.weight[7] = float("nan")
    engine = Engine(model, None)
    bad = engine.add([7], greedy(**LATE[kind]))
    good = engine.add([8], greedy(max_new_tokens=1, **LATE[kind]))
    engine.run()
    with pytest.raises(DataError, match="not finite after 1 tokens"):
        bad.outcome()
    assert good.outcome()
    assert nothing_is_held(engine)


def test_where_all_is_forbidden_the_model_is_not_blamed() -> None:
    engine = Engine(made("gpt2"), None)
    request = engine.add([5, 6], GenerationConfig(suppress_tokens=range(V)))
    engine.run()
    with pytest.raises(DataError, match="nothing is left to write after 2 tokens; forbid less"):
        request.outcome()


def test_contrastive_search_writes_nothing_that_is_banned() -> None:
    engine = Engine(made("gpt2"), None)
    banned = set(range(V)) - {3, 9}
    config = greedy(penalty_alpha=1.0, top_k=4, suppress_tokens=sorted(banned), max_new_tokens=12)
    request = engine.add(PROMPTS[0], config)
    engine.run()
    assert not banned & set(request.outcome()[0].token_ids)


def test_a_full_context_gives_as_many_texts_as_are_asked() -> None:
    engine = Engine(made("gpt2"), None)
    request = engine.add([1] * 96, GenerationConfig(num_return_sequences=3))
    assert [(text.token_ids, text.finish_reason) for text in request.outcome()] == [
        ((), "length")
    ] * 3


def test_a_search_returns_as_many_as_are_asked() -> None:
    engine = Engine(made("gpt2"), None)
    one, two = (engine.add(PROMPTS[0], greedy(num_beams=3, num_return_sequences=n)) for n in (1, 2))
    engine.run()
    assert [len(one.outcome()), len(two.outcome())] == [1, 2]
    assert one.outcome() == two.outcome()[:1]


@pytest.mark.parametrize(("block_size", "beams"), [(3, 4), (16, 16), (5, 3)])
def test_beams_of_all_rows_find_room_in_windows(block_size: int, beams: int) -> None:
    model = made("mixed")
    engine = Engine(model, None, EngineConfig(max_rows=beams, block_size=block_size))
    request = engine.add(list(range(33)), greedy(num_beams=beams))
    engine.run()
    assert len(request.outcome()[0].token_ids) == 20
    assert nothing_is_held(engine)


@pytest.mark.parametrize("prompt", ["", [], "some text"])
def test_without_a_tokenizer_prompts_are_ids(prompt: Any) -> None:
    with pytest.raises(DataError, match="no tokenizer to read the prompt with; give it as"):
        Engine(made("gpt2"), None).add(prompt)


@pytest.mark.parametrize("kind", LATE)
def test_a_stream_gives_what_generate_gives(kind: str) -> None:
    generator = TextGenerator(made("llama", vocab_size=300), words())
    config = greedy(ignore_eos=True, **LATE[kind])
    assert "".join(generator.stream("the", config)) == generator.generate("the", config) != ""


def test_a_chat_may_search() -> None:
    tokens = words(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    chat = Chat(TextGenerator(made("llama", vocab_size=300), tokens), greedy(num_beams=3))
    assert "".join(chat.say("the")) == chat.messages[-1]["content"]


def test_what_is_broken_off_is_not_gone_on_with() -> None:
    generator = TextGenerator(made("llama", vocab_size=300), words(), static=True)
    expected = generator.generate("the", greedy())
    hook = generator.model.backbone.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.generate(["the fox", "quick"], greedy())
    hook.remove()
    assert generator.generate("the", greedy()) == expected
    assert generator._kept is not None
    assert nothing_is_held(generator._kept)


def test_a_handle_is_read_as_often_as_one_likes() -> None:
    heard: list[str] = []
    engine = Engine(made("llama", vocab_size=300), words())
    with EngineThread(engine) as front:
        handle = front.submit("the", greedy(ignore_eos=True), on_text=heard.append)
        pieces = list(handle)
        assert pieces == heard
        assert "".join(pieces) == handle.results()[0]
        reader = threading.Thread(target=lambda: list(handle))
        reader.start()
        reader.join(timeout=20)
        assert not reader.is_alive()


def test_a_thread_outlives_what_it_is_called_for() -> None:
    with EngineThread(Engine(made("gpt2"), None)) as front:
        with pytest.raises(ZeroDivisionError):
            front.call(lambda _: 1 / 0).result(timeout=20)
        assert front.submit([1], greedy()).results(timeout=60)


def test_an_engine_that_cannot_go_on_tells_those_who_wait(monkeypatch: Any) -> None:
    engine = Engine(made("gpt2"), None)

    def broken(*_: Any) -> None:
        raise RuntimeError("torn")

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    with EngineThread(engine) as front, pytest.raises(RuntimeError, match="torn"):
        front.submit([1], greedy()).results(timeout=20)


def test_a_handle_may_be_left_while_the_engine_closes() -> None:
    front = EngineThread(Engine(made("llama", vocab_size=300), words()))
    handle = front.submit("the", greedy(max_new_tokens=90, ignore_eos=True))
    pieces = iter(handle)
    next(pieces)
    front.close()
    pieces.close()  # type: ignore[attr-defined]
    handle.cancel()
    assert handle.results(timeout=20)[0].finish_reason in ("cancelled", "length")


def test_a_reader_who_fails_at_what_was_held_back_ends_one_request() -> None:
    pytest.importorskip("llguidance")
    tokenizer = words()
    model = made("gpt2", vocab_size=len(tokenizer))
    engine = Engine(model, tokenizer)

    def on_text(piece: str) -> None:
        if piece.endswith("c"):
            raise ValueError(piece)

    # No token ends it, and its last letter might begin the stop string.
    config = GenerationConfig(regex="abc", stop=("cx",), max_new_tokens=9)
    one = engine.request(PROMPTS[0], config, ends=(), on_text=on_text)
    engine.enter(one)
    other = engine.add(PROMPTS[1], greedy())
    engine.run()
    assert isinstance(one.error, ValueError)
    assert other.outcome()[0].token_ids == alone(model, PROMPTS[1:2])[0]
    assert nothing_is_held(engine)
