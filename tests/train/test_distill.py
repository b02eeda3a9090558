"""A student that answers like its teacher; activations made again; figures sent elsewhere."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.train import sinks
from polyhead.train.config import TrainConfig
from polyhead.train.distill import distilled
from polyhead.train.objectives import causal_lm
from polyhead.train.recompute import recomputing

from .conftest import text, tiny
from .test_objectives import batch_of


def test_the_loss_is_hintons():
    torch.manual_seed(0)
    student, teacher = tiny(20), tiny(20, seed=5)
    batch = batch_of(3, 8)
    loss = distilled(causal_lm, teacher, weight=0.3, temperature=3.0, hidden=0.5)(
        student.train(), batch
    )
    ours, theirs = (m.eval()(batch.input_ids) for m in (student, teacher))
    counts = batch.labels != -100
    soft = 0.0
    for own, other in zip(ours[counts], theirs[counts], strict=True):
        p, q = F.softmax(other / 3, -1), F.softmax(own / 3, -1)
        soft = soft + (p * (p / q).log()).sum() * 9
    states = [m.backbone(batch.input_ids) for m in (student, teacher)]
    away = (1 - F.cosine_similarity(*states, dim=-1)).mean() * 0.5 * batch.tokens()
    hard = causal_lm(student, batch).total
    assert torch.allclose(loss.total, 0.7 * hard + 0.3 * soft + away, rtol=1e-4)
    assert set(loss.parts) == {"loss", "teacher", "hidden"}
    assert torch.allclose(loss.parts["loss"], hard)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_student_comes_nearer(tmp_path, tokenizer):
    teacher = tiny(tokenizer.vocab_size, seed=9, init_std=0.3).eval()
    student = tiny(tokenizer.vocab_size)
    ids = torch.randint(3, tokenizer.vocab_size, (4, 16))
    before = (student(ids) - teacher(ids)).square().mean()
    config = TrainConfig(steps=40, batch_size=4, context=16, lr=2e-2, warmup=4, out=str(tmp_path))
    trainer = ph.Trainer(
        student, tokenizer, config, teacher=teacher, distillation={"weight": 1.0}, quiet=True
    )
    trainer.fit([text(60)])
    given = torch.tensor([tokenizer.encode(text(5))[:16]])
    told, found = (F.log_softmax(m(given), -1) for m in (teacher, student))
    assert F.kl_div(found, told, log_target=True, reduction="batchmean") / 16 < 0.5
    assert before > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": 1.5}, "weight is 1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"hidden": 1.0}, "states of 16 numbers with the teacher's 32"),
        ({}, "the same vocabulary"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(settings, said):
    vocab = 20 if settings else 30
    wide = {"d_model": 32} if "hidden" in settings else {}
    with pytest.raises(ConfigError, match=said):
        distilled(causal_lm, tiny(vocab, **wide), **settings)(tiny(20).train(), batch_of(2, 6))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5", "deberta-v2", "albert", "swin"])
@pytest.mark.parametrize("which", ["blocks", "half"])
def test_activations_made_again_change_no_gradient(family, which):
    usual = dict(vocab_size=30, d_model=16, num_layers=3, num_heads=2, dropout=0.2)
    sizes = {
        "mixtral": dict(vocab_size=30, d_model=16, num_layers=3, num_heads=2, d_ff=24,
                        num_experts=2),
        "swin": dict(depths=(1, 2), num_heads=(2, 4), d_model=16, image_size=16, patch_size=2,
                     window=4, dropout=0.2),
        "deberta-v2": dict(**usual, position_buckets=4),
    }  # fmt: skip
    model = ph.build(family, seed=0, **sizes.get(family, usual)).train()
    ids = torch.randint(3, 30, (2, 9))
    given = {"swin": (torch.randn(2, 3, 16, 16),), "t5": (ids, ids)}.get(family, (ids,))
    grads = []
    for mode in ("none", which):
        torch.manual_seed(1)
        model.zero_grad()
        with recomputing(model, mode):
            model(*given).float().square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-7), name
    assert not any("forward" in vars(part) for part in model.modules())


def test_less_is_kept():
    model = ph.build("gpt2", vocab_size=30, d_model=32, num_layers=6, num_heads=2).train()
    ids = torch.randint(3, 30, (4, 32))
    kept = {}
    for mode in ("none", "half", "blocks"):
        size = 0

        def note(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), recomputing(model, mode):
            model(ids)
        kept[mode] = size
    assert kept["blocks"] < kept["half"] < kept["none"]
    assert kept["blocks"] < kept["none"] / 3


def test_figures_reach_a_tracker(tmp_path, tokenizer, monkeypatch):
    said = []
    package = SimpleNamespace(
        init=lambda **given: said.append(given) or "run",
        log=lambda values, step: said.append((step, values)),
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = TrainConfig(steps=4, batch_size=2, context=16, log_every=2, out=str(tmp_path / "mine"))
    ph.Trainer(
        tiny(tokenizer.vocab_size), tokenizer, config, callbacks=[sinks.sink("wandb")], quiet=True
    ).fit([text(60)])
    assert said[0]["name"] == "mine"
    assert said[0]["config"]["steps"] == 4
    steps = [step for step, values in said[1:] if "loss" in values]
    assert steps == [2, 4]
    assert all(isinstance(v, float) for _, values in said[1:] for v in values.values())


def test_figures_reach_tensorboard(tmp_path, tokenizer):
    pytest.importorskip("tensorboard")
    config = TrainConfig(steps=2, batch_size=2, context=16, log_every=1, out=str(tmp_path))
    ph.Trainer(
        tiny(tokenizer.vocab_size), tokenizer, config, callbacks=[sinks.sink("tensorboard")],
        quiet=True,
    ).fit([text(60)])  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]


def test_a_sink_that_is_none_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="not one of tensorboard"):
        sinks.sink("paper")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        sinks.sink("trackio")


def test_a_teacher_that_reads_what_is_to_be_guessed_is_refused(tokenizer, tmp_path):
    encoder = ph.build(
        "bert", vocab_size=tokenizer.vocab_size, d_model=32, d_ff=64, num_layers=1, num_heads=2
    )
    config = TrainConfig(steps=1, context=16, out=str(tmp_path))
    with pytest.raises(ConfigError, match="bert, is of the kind encoder"):
        ph.Trainer(tiny(tokenizer.vocab_size), tokenizer, config, teacher=encoder)
