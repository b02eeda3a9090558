import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError
from polyhead.files.safetensors import open_checkpoint
from polyhead.models.blocks import in_blocks
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.lion import Lion
from polyhead.train.loop import train_step
from polyhead.train.muon import Muon
from polyhead.train.objectives import causal_lm
from polyhead.train.optim import Masters, learning_rate, settings_of
from polyhead.train.schedule_free import ScheduleFree

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
    optimizer = Masters(model, TrainConfig(weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, msg=name)


def test_clipping_scales_the_whole_gradient():
    model = tiny(20)
    optimizer = Masters(model, TrainConfig(clip=1.0))
    seen = []
    optimizer.movers[0].step = lambda: seen.extend(m.grad.clone() for m in optimizer.masters)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm = optimizer.step(0.1)
    count = sum(p.numel() for p in model.parameters())
    assert norm == pytest.approx(2 * count**0.5, rel=1e-5)
    assert torch.cat([g.flatten() for g in seen]).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_bfloat16_weights_follow_float32_masters():
    model, reference = tiny(20), tiny(20)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Masters(model, TrainConfig(dtype="bfloat16"))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.head.weight is model.backbone.embedding.weight
    state = optimizer.state()
    for name in exact:
        assert torch.equal(state[f"master.{name}"], exact[name]), "masters keep all digits"
    other = Masters(reference, TrainConfig())
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
    optimizer = Masters(model, TrainConfig(dtype="bfloat16", clip=0.0))
    for _ in range(300):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1 + 1 / 128)
        optimizer.collect()
    assert all(torch.all(m.grad == 300 + 300 / 128) for m in optimizer.masters)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype):
    model = tiny(20)
    optimizer = Masters(model, TrainConfig(dtype=dtype))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    optimizer.collect()
    with pytest.raises(PolyheadError, match="norm is"):
        optimizer.step(0.1)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 20, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(shape, nesterov):
    torch.manual_seed(0)
    ours = [torch.randn(shape) for _ in range(3)]
    matrices = [m for w in ours for m in (w if w.ndim == 3 else [w])]
    theirs = [m.clone() for m in matrices]
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine = Muon(ours, **settings)
    other = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for weight in ours:
            weight.grad = torch.randn(shape)
        for theirs_one, grad in zip(
            theirs, [g for w in ours for g in (w.grad if w.ndim == 3 else [w.grad])], strict=True
        ):
            theirs_one.grad = grad.clone()
        mine.step()
        other.step()
    for one, two in zip(matrices, theirs, strict=True):
        assert torch.allclose(one, two, atol=3e-3), (one - two).abs().max()


def grads(steps):
    return torch.randn(steps, 6, 4, generator=torch.Generator().manual_seed(1))


def test_lion_is_the_papers():
    """Algorithm 2 of Chen et al., line by line."""
    weight, moment = torch.ones(6, 4), torch.zeros(6, 4)
    ours = weight.clone()
    lion = Lion([ours], lr=0.1, betas=(0.8, 0.95), weight_decay=0.5)
    for grad in grads(5):
        ours.grad = grad.clone()
        lion.step()
        update = torch.sign(0.8 * moment + (1 - 0.8) * grad)
        weight = weight - 0.1 * (update + 0.5 * weight)
        moment = 0.95 * moment + (1 - 0.95) * grad
        torch.testing.assert_close(ours, weight)


def test_schedule_free_is_its_authors():
    """Their code, which keeps y and z, moves y by itself, and finds x from both."""
    y, z, squares = torch.ones(6, 4), torch.ones(6, 4), torch.zeros(6, 4)
    ours, average = y.clone(), y.clone()
    mover = ScheduleFree([ours], {ours: average}, betas=(0.9, 0.99), weight_decay=0.5)
    total = 0.0
    for number, (grad, lr) in enumerate(
        zip(grads(6), [0.0, 0.02, 0.04, 0.1, 0.1, 0.1], strict=True)
    ):
        ours.grad, mover.param_groups[0]["lr"] = grad.clone(), lr
        mover.step()
        squares = 0.99 * squares + 0.01 * grad**2
        step = grad / ((squares / (1 - 0.99 ** (number + 1))).sqrt() + 1e-8) + 0.5 * y
        total += lr**2
        share = lr**2 / total if total else 0.0
        y = y.lerp(z, share) + step * lr * (0.9 * (1 - share) - 1)
        z = z - lr * step
        torch.testing.assert_close(ours, y)
        torch.testing.assert_close(average, y.lerp(z, 1 - 1 / 0.9))


def test_schedule_free_has_no_schedule_and_no_other_average():
    config = TrainConfig(steps=20, warmup=4, lr=1.0, optimizer="schedule-free")
    assert [learning_rate(step, config) for step in (0, 3, 10, 19)] == [0.25, 1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"ema is 0\.9: schedule-free has an average of its own"):
        TrainConfig(optimizer="schedule-free", ema=0.9)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "bert", "swin", "t5"])
def test_muon_takes_the_matrices_of_blocks(family):
    usual = dict(vocab_size=30, d_model=16, num_layers=2, num_heads=2)
    sizes = {
        "mixtral": dict(**usual, d_ff=24, num_experts=2),
        "swin": dict(depths=(1, 1), num_heads=(2, 4), d_model=16, image_size=16, patch_size=2,
                     window=4),
    }  # fmt: skip
    model = ph.build(family, **sizes.get(family, usual))
    chosen = in_blocks(model)
    assert chosen
    assert all(p.ndim >= 2 for n, p in model.named_parameters() if n in chosen)
    assert not any("embedding" in n or n.startswith("head") for n in chosen)
    optimizer = Masters(model, TrainConfig(optimizer="muon"))
    assert [type(mover).__name__ for mover in optimizer.movers] == ["AdamW", "Muon"]


OPTIMIZERS = {
    "muon": {"lr": 5e-3, "ema": 0.9}, "lion": {"lr": 1e-3, "ema": 0.9},
    "schedule-free": {"lr": 5e-3},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_learns_and_goes_on(tmp_path, tokenizer, name, dtype):
    from .test_checkpoint import Stop, assert_same, begin, final_state, stop_at

    settings = {"optimizer": name, "dtype": dtype, **OPTIMIZERS[name]}
    begin(tmp_path / "whole", tokenizer, **settings)
    with pytest.raises(Stop):
        begin(tmp_path / "cut", tokenizer, callbacks=[stop_at(12)], **settings)
    begin(tmp_path / "cut", tokenizer, resume=True, model=tiny(tokenizer.vocab_size, seed=7,
          dropout=0.1, embedding_dropout=0.1), **settings)  # fmt: skip
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)
    losses = [line["loss"] for line in whole[2] if "loss" in line]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("setting", [{"ema": 0.8}, {"optimizer": "schedule-free"}], ids=str)
def test_the_average_is_what_is_saved(tmp_path, tokenizer, setting):
    from .test_checkpoint import begin

    model = begin(tmp_path, tokenizer, checkpoint_every=0, **setting)
    last = checkpoint.latest(tmp_path)
    kept, saved = open_checkpoint(last / "trainer"), ph.load(last).state_dict()
    for name, value in saved.items():
        assert torch.equal(value, kept[f"average.{name}"])
        assert torch.equal(value, model.state_dict()[name])
    assert any(not torch.equal(saved[n], kept[f"master.{n}"]) for n in saved)


def test_averages_move_as_they_should():
    model = tiny(20)
    optimizer = Masters(model, TrainConfig(ema=0.75, weight_decay=0.0))
    expected = [m.detach().clone() for m in optimizer.masters]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step(0.01)
        expected = [0.75 * e + 0.25 * m for e, m in zip(expected, optimizer.masters, strict=True)]
    for one, two in zip(expected, optimizer.averages, strict=True):
        torch.testing.assert_close(one.detach(), two)


def test_deeper_layers_learn_slower():
    model = ph.build("bert", vocab_size=30, d_model=16, num_layers=3, num_heads=2)
    config = TrainConfig(layer_decay=0.5, rates=("head=10",), decays=("head=0.3",))
    names = [name for name, _ in model.named_parameters()]
    found = {name: (factor, decay) for name, factor, decay in settings_of(model, names, config)}
    assert found["backbone.embedding.weight"][0] == 0.5**4
    assert found["backbone.layers.0.attention.q.weight"] == (0.5**3, 0.1)
    assert found["backbone.layers.2.attention.q.weight"][0] == 0.5
    assert found["head.dense.weight"] == (10.0, 0.3)
    optimizer = Masters(model, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(1e-3)
    moved = {n: (p - before[n]).abs().mean().item() for n, p in model.named_parameters()}
    first, last = (moved[f"backbone.layers.{i}.attention.q.bias"] for i in (0, 2))
    assert first == pytest.approx(last / 4, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rates": ("head",)}, "rates has 'head': write a part of names=number"),
        ({"rates": ("=2",)}, "rates has '=2'"),
        ({"decays": ("head=-1",)}, "decays has 'head=-1'"),
        ({"rates": ("nose=2",)}, "rates names 'nose', and no parameter"),
        ({"optimizer": "sgd"}, "choose one of adamw, muon"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Masters(tiny(20), TrainConfig(**settings))
