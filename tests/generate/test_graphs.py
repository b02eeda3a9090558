"""Captured steps answer what the model's own forward answers, whatever rows they are of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.test_decode import MODELS, PLAIN, SIZES, shaken, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import polyhead as ph
from polyhead.generate import graphs, runner
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.graphs import GraphSteps
from polyhead.generate.runner import Piece, Runner
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel
from polyhead.nn import moe
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.position import LearnedPositions

aten: Any = torch.ops.aten


class Tape(TorchDispatchMode):
    """On a CPU what a CUDA graph is: the same kernels on the same memory, without Python. What a
    capture refuses (asking for numbers, bringing some from the host) is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.held: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if is_refused(func, args, kwargs or {}):
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        fresh = [x for x in tensors(found) if x.untyped_storage()._cdata not in given]
        self.held.append((args, kwargs, found))
        if fresh or func._schema.is_mutable:
            self.calls.append((func, args, kwargs or {}, fresh))
        return found


def is_refused(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    if func is aten.index.Tensor:  # by numbers, not by what is true
        return any(x is not None and x.dtype == torch.bool for x in args[1])
    if func is aten.repeat_interleave.Tensor:
        return named.get("output_size") is None
    shapes = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
    return any(tag in func.tags for tag in shapes) or func is aten.lift_fresh.default


def tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


class Recorder:
    def __init__(self) -> None:
        self.replays = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with Tape() as tape:
            found = run()

        def replay() -> Tensor:
            self.replays += 1
            for func, args, named, fresh in tape.calls:
                again = tensors(func(*args, **named)) if fresh else func(*args, **named)
                for x, y in zip(fresh, again if fresh else (), strict=False):
                    x.copy_(y)
            return found

        return replay


@pytest.fixture
def differences(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far each replayed step is from the model's own forward of the same tokens."""
    found: list[float] = []
    replayed = Runner._replayed

    def both(self: Runner, batch: list[Piece]) -> list[Tensor] | None:
        ours = replayed(self, batch)
        if ours is None:
            return None
        plain = [self._forward([piece])[0] for piece in batch]
        for mine, states in zip(ours, plain, strict=True):
            found.append(float((mine - states).norm() / states.norm()))
        return ours

    monkeypatch.setattr(Runner, "_replayed", both)
    monkeypatch.setattr(
        runner, "_steps", lambda model, memory: GraphSteps(model, memory, Recorder())
    )
    # Ids and positions are looked at on a CPU alone.
    monkeypatch.setattr(TokenEmbedding, "_check", lambda self, ids: None)
    monkeypatch.setattr(
        LearnedPositions, "forward", lambda self, at: Table.forward(self, at.clamp(min=0))
    )
    monkeypatch.setattr(graphs, "TRIES", 0)
    monkeypatch.setattr(graphs, "_SHORT", 8)
    return found


def steps_of(engine: Engine) -> GraphSteps:
    found = engine.runner._recorded
    assert isinstance(found, GraphSteps)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-mqa", "mistral", "mixtral", "learned"])
@pytest.mark.parametrize("kv", ["model", "int8"])
def test_decoders(
    name: str, kv: str, differences: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, sizes = MODELS[name]
    model = shaken(ph.build(family, seed=0, **sizes)).eval()
    if name == "mixtral":  # on a GPU one product of all experts; here what compiled steps do
        monkeypatch.setattr(
            moe.Experts, "forward", lambda self, x, counts: self._gathered(x, counts)
        )
    engine = write(model, kv=kv)
    assert not steps_of(engine).reason
    assert len(steps_of(engine)._steps) > 2  # of more than one size of batch and of text
    assert len(differences) > 10
    # In eight bits a last bit may move a key by a step.
    assert max(differences) < (2e-3 if kv == "int8" else 1e-5)


@pytest.mark.parametrize("name", ["t5", "marian"])
@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoders(name: str, beams: int, differences: list[float]) -> None:
    model = shaken(ph.build(name, seed=0, **dict(SIZES, d_ff=96))).eval()
    # Later ones take the place of those that are done.
    sources = [[3 + i] * (2 + 17 * (i * i % 5)) + [9, 4] for i in range(9)]
    settings = ph.GenerationConfig(
        num_beams=beams, max_new_tokens=9, decoder_start_token_id=1, temperature=0.0
    )
    found = Seq2Seq(model).generate(sources, settings, tokens_at_once=250)
    assert len(differences) > 5
    assert max(differences) < 1e-5
    alone = [Seq2Seq(model).generate([source], settings)[0] for source in sources]
    assert [each[0].ids for each in found] == [each[0].ids for each in alone]


def llama() -> TaskModel:
    family, sizes = MODELS["llama"]
    return shaken(ph.build(family, seed=0, **sizes)).eval()


def drawn(model: TaskModel) -> list[tuple[int, ...]]:
    engine = Engine(model, None, EngineConfig(max_rows=4, cache_tokens=300, block_size=4))
    settings = ph.GenerationConfig(max_new_tokens=12, temperature=1.0, seed=3)
    requests = [engine.add([5, 6, 7 + i], settings, ends=()) for i in range(3)]
    for _ in range(5):
        engine.step()
    requests.append(engine.add([9] * 11, settings, ends=()))  # its prompt is read beside steps
    engine.run()
    return [request.outcome()[0].token_ids for request in requests]


def test_what_is_drawn_is_the_same(differences: list[float]) -> None:
    captured = drawn(llama())
    assert differences
    count = len(differences)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "TRIES", 10**9)
        assert drawn(llama()) == captured
    assert len(differences) == count


def test_a_capture_that_fails_is_said_once(differences: list[float]) -> None:
    alibi = dict(PLAIN, position="alibi")  # brings its slopes from the host
    model = shaken(ph.build("transformer", seed=0, **alibi)).eval()
    with pytest.warns(UserWarning, match="lift_fresh.default is not permitted") as said:
        engine = write(model)
    assert len(said) == 1
    assert not differences
    assert steps_of(engine).reason


def test_what_is_watched_is_left_to_the_model(differences: list[float]) -> None:
    model = llama()
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100))
    engine.add([1, 2, 3], ph.GenerationConfig(max_new_tokens=9), ends=())
    for _ in range(3):
        engine.step()
    before = len(differences)
    assert before
    with ph.capture(model) as seen:
        engine.step()
    assert seen
    assert len(differences) == before


def test_weights_elsewhere_are_captured_again(differences: list[float]) -> None:
    model = llama()
    engine = Engine(model, None, EngineConfig(max_rows=2, cache_tokens=100))
    settings = ph.GenerationConfig(max_new_tokens=5, temperature=0.0)
    for seed in (1, 2):
        other = shaken(ph.build("llama", seed=seed, **MODELS["llama"][1]))
        model.load_state_dict(other.state_dict(), assign=True)
        engine.add([4 + seed, 5, 6], settings, ends=())
        engine.run()
    assert len(differences) > 4
    assert max(differences) < 1e-5
