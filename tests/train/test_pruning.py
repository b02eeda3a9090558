"""Weights that go while a model learns: as many as the schedule says, for good.

And the teacher that is the model as the run found it.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.compress.prune import prunable
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.models.model import TaskModel
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.distill import cross_correlation, distilled
from polyhead.train.log import read_log
from polyhead.train.objectives import causal_lm
from polyhead.train.optim import Masters
from polyhead.train.pruning import Pruner, sparsity_at

from .conftest import text, tiny
from .test_checkpoint import DROPOUT, SETTINGS, Stop, assert_same, final_state, stop_at
from .test_objectives import batch_of

# Not due at the checkpoint: what goes on has to know what went.
PRUNED = {"prune": 0.5, "prune_every": 3}


def begin(out, tokenizer, *, resume=False, model=None, callbacks=(), told=None, **settings):
    model = model or tiny(tokenizer.vocab_size, **DROPOUT)
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = ph.Trainer(model, tokenizer, config, callbacks=callbacks, quiet=True, **(told or {}))
    return trainer, trainer.fit([text(60)], resume=resume)


def test_the_schedule_is_zhus_and_guptas():
    config = TrainConfig(
        steps=100, prune=0.8, prune_begin=0.1, prune_end=0.5, prune_every=10
    )  # fmt: skip
    # s_f + (s_i - s_f) (1 - (t - t_0) / (n Δt))³ with t_0 = 10, n = 4, Δt = 10.
    stated = {10 + 10 * k: 0.8 - 0.8 * (1 - k / 4) ** 3 for k in range(5)}
    for step in range(-1, 100):
        at = max((s for s in stated if s <= step), default=None)
        assert sparsity_at(step, config) == pytest.approx(0.0 if at is None else stated[at])
    at_once = TrainConfig(steps=10, prune=0.5, prune_begin=0.0, prune_end=0.0)
    assert [sparsity_at(step, at_once) for step in (-1, 0, 9)] == [0.0, 0.5, 0.5]
    late = TrainConfig(steps=10, prune=0.5, prune_begin=1.0, prune_end=1.0)
    assert [sparsity_at(step, late) for step in (8, 9)] == [0.0, 0.5]
    assert sparsity_at(99, TrainConfig(steps=100)) == 0.0


CASES = {
    "adamw": {},
    "bfloat16-ema": {"dtype": "bfloat16", "ema": 0.9},
    "muon-ema": {"optimizer": "muon", "ema": 0.9},
    "muon-bfloat16": {"optimizer": "muon", "dtype": "bfloat16"},
    "global": {"prune_by": "global"},
    "fours": {"prune_by": "2:4"},
}


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("name", CASES)
def test_after_every_step_what_went_is_zero_everywhere(name, family):
    more = {"d_ff": 24, "num_experts": 2} if family == "mixtral" else {}
    model = ph.build(family, vocab_size=20, d_model=16, num_layers=2, num_heads=2, **more)
    names = set(prunable(model))
    config = TrainConfig(
        steps=12, prune=0.5, prune_begin=0.2, prune_end=0.6, prune_every=2, **CASES[name]
    )
    optimizer, pruner = Masters(model.train(), config), Pruner(model, config)
    torch.manual_seed(0)
    before = None
    for step in range(12):
        pruner.before(step, optimizer)
        batch = batch_of(3)
        causal_lm(model, batch).total.backward()
        optimizer.collect()
        optimizer.step(1e-2)
        assert set(optimizer.pruned) == (names if step >= 4 else set())
        for at, (key, master) in enumerate(zip(optimizer.names, optimizer.masters, strict=True)):
            goes = optimizer.pruned.get(key, torch.zeros_like(master, dtype=torch.bool))
            moments = [
                value
                for mover in optimizer.movers
                for value in mover.state.get(master, {}).values()
                if value.shape == master.shape
            ]
            averages = optimizer.averages[at : at + 1]
            for tensor in (master, optimizer.params[at], *moments, *averages):
                assert not tensor[goes].any()
            if before is not None and key in before:
                assert goes[before[key]].all(), "what went came back"
        found = pruner.found(optimizer)
        assert found is not None
        assert found.share == pytest.approx(sparsity_at(step, config), abs=1e-3)
        before = dict(optimizer.pruned)
    assert found.share == 0.5
    assert ph.sparsity(model).share == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "dtype": "bfloat16", "ema": 0.9, "prune_by": "global"},
        {"optimizer": "muon", "prune_begin": 0.5, "prune_end": 0.9},
    ],
)
@pytest.mark.parametrize("told", [{}, {"teacher": "self", "distillation": {"hidden": 1.0}}])
def test_ten_steps_an_end_and_ten_more_are_twenty(tmp_path, tokenizer, settings, told):
    settings = {**PRUNED, **settings}
    _, figures = begin(tmp_path / "whole", tokenizer, told=told, **settings)
    with pytest.raises(Stop):
        begin(tmp_path / "cut", tokenizer, callbacks=[stop_at(12)], told=told, **settings)
    # Another process would draw other weights: neither they nor a teacher of them may be left.
    other = tiny(tokenizer.vocab_size, seed=7, **DROPOUT)
    begin(tmp_path / "cut", tokenizer, resume=True, model=other, told=told, **settings)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)
    assert figures["sparsity"] == 0.5
    saved = ph.load(checkpoint.latest(tmp_path / "cut"))
    assert ph.sparsity(saved).share == 0.5
    shares = [line["sparsity"] for line in read_log(tmp_path / "cut/log.jsonl") if "loss" in line]
    assert shares == sorted(shares)
    assert shares[-1] == 0.5
    assert shares[1] < 0.5


@pytest.mark.parametrize(("by", "share"), [("heads", 0.5), ("neurons", 0.25)])
def test_parts_fade_and_then_go_without_a_change(tmp_path, tokenizer, by, share):
    model = tiny(tokenizer.vocab_size, num_heads=4)
    trainer, figures = begin(
        tmp_path, tokenizer, model=model, prune=share, prune_by=by, prune_every=1, log_every=1
    )
    assert figures["sparsity"] == share
    shares = [line["sparsity"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert shares == sorted(shares)
    assert len(set(shares)) > 2  # one after another
    small, ids = ph.shrink(trainer.model.eval(), **{by: share}), torch.tensor([[1, 4, 2, 3]])
    assert small.num_parameters() < model.num_parameters()
    assert torch.allclose(small(ids), trainer.model(ids), atol=1e-5)


def test_prune_0_is_no_pruning(tmp_path, tokenizer):
    begin(tmp_path / "a", tokenizer)
    begin(tmp_path / "b", tokenizer, prune=0.0, prune_by="global", prune_every=1)
    tensors = [final_state(tmp_path / name)[0] for name in "ab"]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not any(name.startswith("pruned.") for name in tensors[0])


def test_the_best_checkpoint_has_all_zeros(tmp_path, tokenizer, monkeypatch):
    """However much better the model was before."""
    losses = iter(range(1, 20))
    monkeypatch.setattr(
        "polyhead.train.running.score_tokens",
        lambda *args, **named: SimpleNamespace(loss=float(next(losses)), bits_per_byte=1.0),
    )
    begin(tmp_path, tokenizer, keep=1, **{**PRUNED, "validate_every": 0, "prune_end": 0.6})
    best = checkpoint.best(tmp_path)
    assert best is not None
    assert best.name == "step-00000015"
    assert ph.sparsity(ph.load(best)).share == 0.5


def test_targets_alone_are_pruned(tmp_path, tokenizer):
    trainer, _ = begin(tmp_path, tokenizer, prune_targets=("ffn.up",), **PRUNED)
    shares = ph.sparsity(trainer.model).matrices
    assert {name for name, share in shares.items() if share} == {n for n in shares if "ffn.up" in n}


def test_the_teacher_is_the_model_as_the_run_began(tmp_path, tokenizer, monkeypatch):
    """After a kill, too; from the run's own copy, and from a checkpoint where there is one."""
    ids = torch.randint(3, tokenizer.vocab_size, (2, 9))
    tiny(tokenizer.vocab_size, seed=3, **DROPOUT).save(tmp_path / "base")
    for name, make in {
        "fresh": lambda: tiny(tokenizer.vocab_size, seed=3, **DROPOUT),
        "loaded": lambda: ph.load(tmp_path / "base"),
    }.items():
        out, told = tmp_path / name, {"teacher": "self"}
        wanted = make().eval()(ids)
        with pytest.raises(Stop):
            begin(out, tokenizer, model=make(), callbacks=[stop_at(12)], told=told, **PRUNED)
        assert (out / "teacher.safetensors").exists() == (name == "fresh")
        half = ph.load(checkpoint.latest(out))
        assert not torch.allclose(half(ids), wanted, atol=1e-3)
        half.origin = None
        trainer, _ = begin(out, tokenizer, model=half, resume=True, told=told, **PRUNED)
        teacher = trainer.objective.teacher
        assert torch.equal(teacher(ids), wanted)
        assert not any(p.requires_grad for p in teacher.parameters())
        assert ph.sparsity(teacher).share < 0.01


def test_a_teacher_that_is_gone_or_another_is_said(tmp_path, tokenizer):
    base, out, told = tmp_path / "base", tmp_path / "run", {"teacher": "self"}
    tiny(tokenizer.vocab_size, **DROPOUT).save(base)
    begin(out, tokenizer, model=ph.load(base), told=told, steps=5)
    again = dict(resume=True, told=told, steps=5)
    tiny(tokenizer.vocab_size, seed=8, **DROPOUT).save(base, force=True)
    with pytest.raises(FileError, match=r"is not the teacher that .* began with any more"):
        begin(out, tokenizer, **again)
    (out / "teacher.json").unlink()
    with pytest.raises(FileError, match=r"teacher.json is missing"):
        begin(out, tokenizer, **again)
    # A model that was changed since it was loaded is none of a checkpoint's.
    changed = ph.load(base)
    with torch.no_grad():
        changed.head.weight.mul_(1.01)
    begin(tmp_path / "changed", tokenizer, model=changed, told=told, steps=5)
    assert json.loads((tmp_path / "changed/teacher.json").read_text())["origin"] is None
    (tmp_path / "changed/teacher.safetensors").unlink()
    with pytest.raises(FileError, match=r"teacher.safetensors is missing"):
        begin(tmp_path / "changed", tokenizer, **again)


def test_a_run_begun_anew_leaves_no_old_teacher(tmp_path, tokenizer):
    begin(tmp_path, tokenizer, told={"teacher": "self"}, steps=5)
    assert (tmp_path / "teacher.safetensors").exists()
    config = TrainConfig(out=str(tmp_path), **{**SETTINGS, "steps": 5})
    ph.Trainer(tiny(tokenizer.vocab_size), tokenizer, config, quiet=True).fit(
        [text(60)], force=True
    )
    assert not list(tmp_path.glob("teacher*"))


def test_the_loss_of_a_pruned_student_is_the_papers():
    """Cross-entropy, divergence from the unpruned model, and the correlations of last states."""
    torch.manual_seed(0)
    teacher = tiny(20, init_std=0.3)
    student = ph.prune(teacher, 0.5)
    batch = batch_of(3)
    settings = dict(weight=0.4, temperature=2.0, correlation=0.7)
    loss = distilled(causal_lm, teacher, **settings)(student.train(), batch)
    counts = batch.labels != -100
    ours, theirs = (m.eval()(batch.input_ids)[counts] for m in (student, teacher))
    soft = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="sum") * 4
    z, t = (m.backbone(batch.input_ids).flatten(0, 1).double() for m in (student, teacher))
    z, t = z - z.mean(0), t - t.mean(0)
    apart = 0.0
    for i in range(16):
        for j in range(16):
            c = (z[:, i] * t[:, j]).sum() / (z[:, i].norm() * t[:, j].norm())
            apart = apart + ((1 - c) ** 2 if i == j else 0.005 * c**2)
    whole = 0.6 * causal_lm(student, batch).total + 0.4 * soft + 0.7 * batch.tokens() * apart / 16
    assert torch.allclose(loss.total, whole.float(), rtol=1e-4)
    assert set(loss.parts) == {"loss", "teacher", "correlation"}
    same = torch.randn(50, 4)
    assert cross_correlation(same, 3 * same + 1) < cross_correlation(same, torch.randn(50, 4)) / 5


def test_states_of_padding_do_not_count():
    student, teacher = tiny(20).train(), tiny(20, seed=5)
    batch = batch_of(2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    batch = type(batch)(batch.input_ids, batch.labels.masked_fill(mask == 0, -100), mask)
    padded = type(batch)(*(F.pad(t, (0, 5), value=v) for t, v in
                           ((batch.input_ids, 0), (batch.labels, -100), (mask, 0))))  # fmt: skip
    objective = distilled(causal_lm, teacher, hidden=1.0, correlation=1.0)
    one, other = (objective(student, some).parts for some in (batch, padded))
    for name in ("hidden", "correlation"):
        assert torch.allclose(one[name], other[name], rtol=1e-4), name


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prune": 1.0}, "prune is 1.0"),
        ({"prune_begin": 0.8, "prune_end": 0.5}, "prune_begin is 0.8 and prune_end 0.5"),
        (
            {"prune_by": "rows"},
            "prune_by is 'rows': choose one of layer, global, 2:4, heads",
        ),
        ({"prune": 0.1, "prune_by": "heads"}, "heads is 0.1: of 2 side by side none would go"),
        ({"prune": 0.5, "prune_by": "heads", "prune_targets": ("ffn",)}, "leave out targets"),
        ({"prune": 0.4, "prune_by": "2:4"}, "by 2:4 it is 0.5"),
        ({"prune": 0.5, "prune_targets": ("nose",)}, "targets names 'nose'"),
        ({"prune_every": 0}, "prune_every is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, tokenizer, settings, said):
    with pytest.raises(ConfigError, match=said):
        begin(tmp_path, tokenizer, **settings)


def test_models_that_cannot_be_pruned_are_refused(tmp_path, tokenizer):
    def adapted() -> TaskModel:
        model = tiny(tokenizer.vocab_size)
        ph.add_adapter(model)
        return model

    for told, settings, model, said in (
        ({}, {"prune": 0.5}, adapted(), "with adapters is not pruned"),
        ({"teacher": "self"}, {}, adapted(), "an adapter learns"),
    ):
        with pytest.raises(ConfigError, match=said):
            begin(tmp_path, tokenizer, model=model, told=told, **settings)
    still = tiny(tokenizer.vocab_size)
    still.backbone.layers[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="does not learn"):
        begin(tmp_path, tokenizer, model=still, prune=0.5)


def test_more_steps_may_not_change_what_was_pruned(tmp_path, tokenizer):
    begin(tmp_path, tokenizer, schedule="constant", **PRUNED)
    with pytest.raises(ConfigError, match="pruned otherwise"):
        begin(tmp_path, tokenizer, resume=True, schedule="constant", **{**PRUNED, "steps": 60})


def test_the_command_line_prunes_and_goes_on(tmp_path, monkeypatch):
    from polyhead.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text(80))
    sizes = "--set d_model=16 num_layers=1 num_heads=2 --context 16 --batch-size 2 --warmup 1"
    common = f"{sizes} --validate-every 0 --sample-every 0"
    assert main(f"train a.txt {common} --steps 4 --out base".split()) == 0
    thin = "train a.txt --model base --context 16 --batch-size 2 --prune 0.5 --prune-every 1 "
    thin += "--teacher self --distillation correlation=0.1 --sample-every 0 --log-every 1"
    assert main(f"{thin} --steps 8 --checkpoint-every 4 --out thin".split()) == 0
    newest = checkpoint.latest(tmp_path / "thin")
    assert ph.sparsity(ph.load(newest)).share == 0.5
    shutil.rmtree(newest)
    assert main("train --out thin --resume".split()) == 0
    assert ph.sparsity(ph.load(newest)).share == 0.5
    assert "pruned.backbone" in "".join(open_checkpoint(newest / "trainer"))
