import pytest
import torch

from polyhead.errors import PolyheadError
from polyhead.train.config import TrainConfig
from polyhead.train.loop import train_step
from polyhead.train.objectives import causal_lm
from polyhead.train.optim import MasterAdamW, learning_rate

from .conftest import tiny
from .test_objectives import batch_of


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", {0: 0.25, 3: 1.0, 19: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 19: 0.1, 100: 0.1}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 19: 0.1}),
        ("wsd", {0: 0.25, 3: 1.0, 16: 1.0, 18: 0.4, 19: 0.1}),
    ],
)
def test_schedules(schedule, values):
    config = TrainConfig(steps=20, warmup=4, lr=1.0, schedule=schedule)
    for step, value in values.items():
        assert learning_rate(step, config) == pytest.approx(value), step
    rates = [learning_rate(step, config) for step in range(3, 20)]
    assert rates == sorted(rates, reverse=True)


def test_a_run_shorter_than_its_warmup_warms_up_shorter():
    config = TrainConfig(steps=20, warmup=100, lr=1.0)
    assert learning_rate(1, config) == 1.0
    assert learning_rate(0, TrainConfig(steps=1)) > 0
    assert learning_rate(0, TrainConfig(steps=5, warmup=0, lr=1.0)) == 1.0


def test_only_matrices_decay():
    model = tiny(20)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, TrainConfig(weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_clipping_scales_the_whole_gradient():
    model = tiny(20)
    optimizer = MasterAdamW(model, TrainConfig(clip=1.0))
    seen = []
    optimizer.adamw.step = lambda: seen.extend(m.grad.clone() for m in optimizer.masters)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm = optimizer.step(0.1)
    count = sum(p.numel() for p in model.parameters())
    assert norm == pytest.approx(2 * count**0.5, rel=1e-5)
    assert torch.cat([g.flatten() for g in seen]).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_bfloat16_weights_follow_float32_masters():
    model, reference = tiny(20), tiny(20)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MasterAdamW(model, TrainConfig(dtype="bfloat16"))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.head.weight is model.backbone.embedding.weight
    state = optimizer.state()
    for name in exact:
        assert torch.equal(state[f"master.{name}"], exact[name]), "masters keep all digits"
    other = MasterAdamW(reference, TrainConfig())
    for _ in range(20):  # steps far below what bfloat16 weights alone could take up
        train_step(model, optimizer, causal_lm, [batch_of(4)], 1e-5)
        train_step(reference, other, causal_lm, [batch_of(4)], 1e-5)
    state = optimizer.state()
    for name, p in model.named_parameters():
        assert state[f"exp_avg.{name}"].dtype == torch.float32
        assert torch.equal(p.detach(), state[f"master.{name}"].bfloat16())
    moved = torch.cat([(state[f"master.{n}"] - exact[n]).flatten() for n in exact])
    wanted = torch.cat([(p.detach() - exact[n]).flatten() for n, p in reference.named_parameters()])
    assert torch.cosine_similarity(moved, wanted, dim=0) > 0.9


def test_bfloat16_gradients_are_summed_in_float32():
    model = tiny(20)
    optimizer = MasterAdamW(model, TrainConfig(dtype="bfloat16", clip=0.0))
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1 + 1 / 128)
        optimizer.collect()
    assert all(torch.all(m.grad == 300 + 300 / 128) for m in optimizer.masters)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype):
    model = tiny(20)
    optimizer = MasterAdamW(model, TrainConfig(dtype=dtype))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.collect()
    with pytest.raises(PolyheadError, match="norm is"):
        optimizer.step(0.1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
