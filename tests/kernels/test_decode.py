"""A recorded step answers what the model's own forward answers, in every family of decoders."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.parts import shaken as shaken_by
from torch import Tensor, nn

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.kernels import decode
from polyhead.kernels.decode import Ends
from polyhead.kernels.native import library
from polyhead.models.model import TaskModel

pytestmark = pytest.mark.skipif(library("step") is None, reason="nothing compiles it here")

SIZES: dict[str, Any] = dict(vocab_size=70, d_model=64, num_layers=2, num_heads=4)
ODD: dict[str, Any] = dict(vocab_size=67, d_model=36, num_layers=3, num_heads=3)
PLAIN: dict[str, Any] = dict(SIZES, kind="decoder", d_ff=96)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(SIZES, d_ff=96, num_kv_heads=2, tie_embeddings=True)),
    "llama-mqa": ("llama", dict(SIZES, d_ff=100, num_kv_heads=1, head_dim=24, qkv_bias=True)),
    "llama-odd": ("llama", dict(ODD, d_ff=50)),
    "mistral": ("mistral", dict(SIZES, d_ff=96, num_kv_heads=2, window=5)),
    "qwen3": ("qwen3", dict(SIZES, d_ff=96, num_kv_heads=2)),
    "gpt2": ("gpt2", SIZES),
    "gpt2-odd": ("gpt2", ODD),
    "mixtral": ("mixtral", dict(SIZES, d_ff=48, num_experts=4, top_k=2)),
    "learned": ("transformer", dict(PLAIN, position="learned")),
    "sinusoidal": ("transformer", dict(PLAIN, position="sinusoidal")),
    "rotary": ("transformer", dict(PLAIN, position="rotary", norm="rms")),
    "alibi": ("transformer", dict(PLAIN, position="alibi", activation="relu2")),
    "post-norm": ("transformer", dict(PLAIN, position="learned", norm_first=False)),
}
FORMS: dict[str, Callable[[TaskModel], TaskModel]] = {
    "plain": lambda model: model,
    "packed": ph.pack,
    "int4": lambda model: ph.pack(ph.quantize(model, "int4")),
    "int8": lambda model: ph.pack(ph.quantize(model, "int8")),
    "int8-rows": lambda model: ph.pack(ph.quantize(model, "int8-rows")),
}


def shaken(model: TaskModel) -> TaskModel:
    return shaken_by(model, 0.1, 0)


@pytest.fixture
def differences(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far each replayed step, its states or its logits, is from the forward of the same
    tokens, of its length; the likeliest tokens are those of its logits."""
    found: list[float] = []
    replayed, followed = Runner._replayed, Runner.ends

    def both(self: Runner, batch: list[Piece]) -> list[Tensor] | None:
        ours = replayed(self, batch)
        if ours is None:
            return None
        plain = [self._forward([piece])[0] for piece in batch]
        for mine, states in zip(ours, plain, strict=True):
            found.append(_away(mine, states))
        return plain

    def both_ends(self: Runner, pieces: list[Piece]) -> Ends | None:
        ours = followed(self, pieces)
        if ours is None:
            return None
        assert ours.likeliest == ours.logits.argmax(1).tolist()
        plain = torch.cat([self.logits(self._forward([piece])[0]) for piece in pieces])
        found.append(_away(ours.logits, plain))
        return Ends(plain, plain.argmax(1).tolist())

    monkeypatch.setattr(Runner, "_replayed", both)
    monkeypatch.setattr(Runner, "ends", both_ends)
    monkeypatch.setattr(decode, "TRIES", 0)
    return found


def _away(ours: Tensor, plain: Tensor) -> float:
    return float((ours.float() - plain.float()).norm() / plain.float().norm())


def write(model: TaskModel, **named: Any) -> Engine:
    """Ragged texts that end one after another, so that there are steps of many sizes."""
    engine = Engine(model, None, EngineConfig(max_rows=5, cache_tokens=400, block_size=4, **named))
    for number in range(5):
        prompt = [(7 * number + i) % 60 + 1 for i in range(2 + 3 * number)]
        engine.add(prompt, ph.GenerationConfig(max_new_tokens=4 + 3 * number), ends=())
    engine.run()
    return engine


def worst(differences: list[float], name: str, rounded: bool) -> float:
    """The largest, or that of three quarters where rounding decides which experts a token takes:
    of two that a last bit parts either may be taken, and what they say is far apart."""
    share = 0.75 if rounded and "num_experts" in MODELS[name][1] else 1.0
    return sorted(differences)[math.ceil(share * len(differences)) - 1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_of_every_decoder(name: str, form: str, differences: list[float]) -> None:
    family, sizes = MODELS[name]
    model = FORMS[form](shaken(ph.build(family, seed=0, **sizes)).eval())
    engine = write(model)
    assert engine.runner._recorded is not None
    assert engine.runner._recorded.reason == ""
    assert engine.runner._recorded.head_reason == ""
    assert len(differences) > 10
    # Where activations are rounded, a last bit may move one of them by a whole step.
    rounded = form.startswith("int")
    assert worst(differences, name, rounded) < (2e-2 if rounded else 1e-5)
    assert sorted(differences)[len(differences) // 2] < 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("form", ["plain", "packed", "int8"])
@pytest.mark.parametrize("kv", ["model", "fp16", "int8"])
def test_in_bfloat16(name: str, form: str, kv: str, differences: list[float]) -> None:
    family, sizes = MODELS[name]
    model = FORMS[form](shaken(ph.build(family, seed=0, **sizes)).eval().bfloat16())
    write(model, kv=kv)
    assert len(differences) > 10
    assert worst(differences, name, rounded=True) < 4e-2


@pytest.mark.parametrize("kv", ["model", "fp16", "int8"])
@pytest.mark.parametrize("name", ["t5", "marian", "transformer"])
@pytest.mark.parametrize("form", ["plain", "int4"])
@pytest.mark.parametrize("beams", [1, 3])
def test_of_encoder_decoders(
    name: str, form: str, beams: int, kv: str, differences: list[float]
) -> None:
    model = shaken(ph.build(name, seed=0, **dict(SIZES, d_ff=96))).eval()
    writer = Seq2Seq(FORMS[form](model))
    sources = [[3, 4, 5, 6, 9, 8, 2, 11], [7, 8, 9], [5]]
    settings = dict(max_new_tokens=9, decoder_start_token_id=1, temperature=0.0)
    writer.generate(sources, ph.GenerationConfig(num_beams=beams, **settings))
    assert len(differences) > 5
    assert max(differences) < (2e-2 if form == "int4" else 1e-5)


def llama(**changes: Any) -> TaskModel:
    return shaken(ph.build("llama", seed=0, **dict(MODELS["llama"][1], **changes))).eval()


class TestWhatIsNotRecorded:
    def test_what_looks_at_weights(self, differences: list[float]) -> None:
        model = llama()
        engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100))
        engine.add([1, 2, 3], ph.GenerationConfig(max_new_tokens=9), ends=())
        for _ in range(3):
            engine.step()
        before = len(differences)
        assert before == 3
        with ph.capture(model) as seen:
            engine.step()
        assert len(differences) == before
        assert seen
        engine.step()
        assert len(differences) == before + 1

    @pytest.mark.parametrize("position", ["shaw"])
    def test_positions_that_need_the_weights(self, position: str, differences: list[float]) -> None:
        model = shaken(ph.build("transformer", seed=0, **dict(PLAIN, position=position))).eval()
        engine = write(model)
        assert engine.runner._recorded is not None
        assert engine.runner._recorded.reason == "its positions are not known"
        assert not differences

    def test_adapters(self, differences: list[float]) -> None:
        model = llama()
        ph.add_adapter(model)
        write(model)
        assert not differences

    def test_an_activation_of_ones_own_is_left_to_torch(self, differences: list[float]) -> None:
        model = llama()
        for part in model.modules():
            if hasattr(part, "activation"):
                part.activation = lambda x: torch.special.expit(x) * x  # pyright: ignore
        write(model)
        assert differences
        assert max(differences) < 1e-5

    def test_what_asks_for_numbers(self, differences: list[float]) -> None:
        class Asks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 2 if bool((x > 0).all()) else x

        model = llama()
        model.backbone.norm = Asks()
        engine = write(model)
        assert not differences
        assert engine.runner._recorded is not None
        assert "depends on what is computed" in engine.runner._recorded.reason


def test_weights_that_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TRIES", 0)
    model = llama()
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100))
    settings = ph.GenerationConfig(max_new_tokens=9, temperature=0.0)

    def answer(engine: Engine) -> tuple[int, ...]:
        request = engine.add([1, 2, 3], settings, ends=())
        engine.run()
        return request.outcome()[0].token_ids

    first = answer(engine)
    with torch.no_grad():
        for parameter in model.parameters():  # in place
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    fresh = EngineConfig(max_rows=2, cache_tokens=90)  # without what the other one remembers
    second = answer(Engine(model, None, fresh))
    assert second != first
    other = Engine(model, None, fresh)
    assert answer(other) == second
    model.load_state_dict(llama().state_dict(), assign=True)  # elsewhere
    request = other.add([4, 5, 6], settings, ends=())
    other.run()
    alone = Engine(llama(), None, fresh)
    expected = alone.add([4, 5, 6], settings, ends=())
    alone.run()
    assert request.outcome()[0].token_ids == expected.outcome()[0].token_ids


def _t5() -> TaskModel:
    return shaken(ph.build("transformer", seed=0, **dict(PLAIN, position="t5"))).eval()


def _adapters(model: TaskModel) -> None:
    ph.add_adapter(model)
    for name, weight in model.named_parameters():
        if "adapters" in name:
            weight.data.normal_()


def _first(model: TaskModel, name: str) -> Any:
    return next(part for path, part in model.named_modules() if path.endswith(name))


def _another_part(model: TaskModel) -> None:
    layer = _first(model, "layers.0")
    layer.ffn = copy.deepcopy(layer.ffn)
    layer.ffn.register_forward_hook(lambda part, given, found: found * 0.3)


def _forward_of_ones_own(model: TaskModel) -> None:
    linear = _first(model, "attention.q")
    plain = linear.forward
    linear.forward = lambda x: plain(x) * 2


CHANGES: dict[str, tuple[Callable[[], TaskModel], Callable[[TaskModel], Any]]] = {
    "a table that a bias is made of": (
        _t5, lambda model: _first(model, "table").weight.data.normal_()
    ),
    "weights laid out anew": (
        lambda: ph.pack(llama()),
        lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    ),
    "adapters": (llama, _adapters),
    "another part with a hook": (llama, _another_part),
    "a forward of one's own": (llama, _forward_of_ones_own),
    "an activation": (llama, lambda model: setattr(_first(model, "ffn"), "activation", torch.tanh)),
    "what a norm adds": (llama, lambda model: setattr(_first(model, "backbone.norm"), "eps", 0.5)),
    "written in place": (llama, lambda model: [x.mul_(1.1) for x in model.parameters()]),
    "other memory": (
        llama, lambda model: [setattr(x, "data", x.data * 1.1) for x in model.parameters()]
    ),
}  # fmt: skip
"""What a model is at first, and what becomes of it."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_another_one_now(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(decode, "TRIES", 0)
    build, change = CHANGES[name]
    model = build()
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100, block_size=4))
    prompt = [*range(1, 10)]
    settings = ph.GenerationConfig(max_new_tokens=9, temperature=0.0, logprobs=1)

    def furthest() -> float:
        """How far log-probabilities are from those of one forward of the whole text."""
        request = engine.add(prompt, settings, ends=())
        engine.run()
        text = request.outcome()[0]
        assert text.logprobs is not None
        with torch.no_grad():
            whole = model(torch.tensor([prompt + list(text.token_ids)]))[0, len(prompt) - 1 : -1]
        expected = whole.log_softmax(-1).gather(1, torch.tensor(text.token_ids)[:, None])[:, 0]
        return float((expected - torch.tensor([x.logprob for x in text.logprobs])).abs().max())

    assert furthest() < 1e-4
    assert furthest() < 1e-4  # a text whose beginning is held
    with torch.no_grad():
        change(model)
    assert furthest() < 1e-4
    assert furthest() < 1e-4


def test_a_part_keeps_the_forward_that_it_was_given(differences: list[float]) -> None:
    model = llama()
    _forward_of_ones_own(model)
    write(model)
    assert max(differences) < 1e-5
    assert "forward" in vars(_first(model, "attention.q"))


def test_what_is_drawn_is_not_recorded(differences: list[float]) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(x.shape[-1])

    model = llama()
    model.backbone.norm = Noise()
    engine = write(model)
    assert not differences
    assert engine.runner._recorded is not None
    assert "is drawn" in engine.runner._recorded.reason


def test_a_copy_of_an_engine_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TRIES", 0)
    engine = Engine(llama(), None, EngineConfig(max_rows=2, cache_tokens=100))
    settings = ph.GenerationConfig(max_new_tokens=12, temperature=0.0)
    request = engine.add([1, 2, 3], settings, ends=())
    for _ in range(5):
        engine.step()
    other = copy.deepcopy(engine)
    (theirs,) = other.scheduler.running
    engine.run()
    other.run()
    assert theirs.outcome()[0].token_ids == request.outcome()[0].token_ids


def test_a_cast_model_wants_another_engine() -> None:
    model = llama()
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100))
    model.bfloat16()
    with pytest.raises(ConfigError, match="make another engine"):
        engine.add([1, 2, 3], ends=())


def test_as_many_threads_as_one_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One, as many as there are, more than rows and heads: the same up to how sums are split."""
    monkeypatch.setattr(decode, "TRIES", 0)
    before = torch.get_num_threads()
    engine = Engine(FORMS["int4"](llama()), None, EngineConfig(max_rows=3, cache_tokens=200))
    for number in range(3):
        engine.add([*range(1, 9 - number)], ph.GenerationConfig(max_new_tokens=30), ends=())
    engine.step()
    texts = [text for request in engine.scheduler.running for text in request.texts]
    steps = engine.runner._recorded
    assert steps is not None
    rows = [text.row for text in texts if text.row is not None]
    for count in (1, 3):
        found: list[Tensor] = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            try:
                steps.check()
                at = [text.held for text in texts][:count]
                states = steps.read([5, 6, 7][:count], rows[:count], at)
            finally:
                torch.set_num_threads(before)
            assert states is not None
            found.append(states)
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


NAN, INF = float("nan"), float("inf")
LIKELIEST: dict[str, tuple[dict[int, float], int]] = {
    "the largest": ({7: 50.0, 30: 49.0}, 7),
    "the last of all": ({-1: 50.0}, 66),
    "the first of several": ({3: 50.0, 4: 50.0, 40: 50.0, -1: 50.0}, 3),
    "several in the second half": ({40: 50.0, 61: 50.0}, 40),
    "below zero": (dict.fromkeys(range(67), -5.0) | {20: -4.0}, 20),
    "some that are forbidden": (dict.fromkeys(range(30), -INF) | {31: 50.0}, 31),
    "all that are forbidden": (dict.fromkeys(range(67), -INF), -1),
    "no number": ({2: NAN, 50: 50.0}, -1),
    "no number at the end": ({-1: NAN, 5: 50.0}, -1),
    "one without an end": ({9: INF}, -1),
}
"""What stands where among 67 small logits, and which token is the likeliest."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_likeliest_token(threads: int, dtype: torch.dtype) -> None:
    logits = torch.randn(len(LIKELIEST), 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, (stands, _) in zip(logits, LIKELIEST.values(), strict=True):
        for place, x in stands.items():
            row[place] = x
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for some in (slice(None), slice(2, 3), slice(7, 8)):
            with decode.Tape() as tape:
                found = decode._likeliest(tape, logits[some])
            step = decode.Step(tape, [found])
            for _ in range(3):
                step()
                expected = [token for _, token in LIKELIEST.values()][some]
                assert step.outputs[0].tolist() == expected
    finally:
        torch.set_num_threads(before)
