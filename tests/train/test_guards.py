"""What a run survives: steps that are no numbers, outliers, and leaps of the loss."""

import math
import random
import statistics
from itertools import pairwise

import pytest
import torch

from polyhead.errors import FileError, PolyheadError
from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.guards import WARM, Average, Guard
from polyhead.train.log import TIMES, read_log, standing
from polyhead.train.loop import Trainer
from polyhead.train.objectives import Loss, causal_lm

from .conftest import text, tiny

SETTINGS = {
    "steps": 12, "batch_size": 2, "context": 16, "warmup": 2, "log_every": 1,
    "checkpoint_every": 4, "held_out": 0.0, "schedule": "constant",
}  # fmt: skip


def run_with(tokenizer, out, spoil, **settings):
    """A run whose loss, and gradients, `spoil(call)` multiplies."""
    calls = []

    def objective(model, batch):
        loss = causal_lm(model, batch)
        if not model.training:
            return loss
        calls.append(batch.input_ids)
        factor = spoil(len(calls) - 1)
        return Loss(loss.total * factor, loss.tokens, {"loss": loss.total.detach() * factor})

    model = tiny(tokenizer.vocab_size)
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = Trainer(model, tokenizer, config, objective=objective, quiet=True)
    return trainer, calls


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_that_are_no_numbers_are_left_out(run, tokenizer, value, dtype):
    trainer, calls = run_with(
        tokenizer, run, lambda call: value if call in (0, 5, 6) else 1.0, dtype=dtype
    )
    trainer.fit([text(60)])
    assert len(calls) == 12
    log = read_log(run / "log.jsonl")
    assert [line["step"] for line in log if "skipped" in line] == [1, 6, 7]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    found = open_checkpoint(checkpoint.latest(run) / "trainer")
    steps = {int(found[name]) for name in found if name.startswith("step.")}
    assert steps == {9}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing_wherever_it_is(run, tokenizer, value):
    """20 places, one after the other; each step leaves every weight and moment as it was."""
    trainer, _ = run_with(tokenizer, run, lambda call: 1.0, steps=24, skips=30)
    names = [name for name, _ in trainer.model.named_parameters()]
    places = [names[i * len(names) // 20] for i in range(20)]
    hooks = []
    seen = []

    def spoil(trainer, record):
        if hooks:
            hooks.pop().remove()
        seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        if len(seen) <= len(places):
            param = dict(trainer.model.named_parameters())[places[len(seen) - 1]]
            hooks.append(param.register_hook(lambda grad: torch.full_like(grad, value)))

    trainer.callbacks = [spoil]
    trainer.fit([text(60)])
    log = [line for line in read_log(run / "log.jsonl") if "step" in line]
    assert sum("skipped" in line for line in log) == 20
    for before, after in pairwise(seen[:21]):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_too_many_in_a_row_end_the_run(run, tokenizer):
    trainer, _ = run_with(tokenizer, run, lambda call: 1.0 if call < 5 else math.nan, skips=3)
    with pytest.raises(PolyheadError, match=r"step 9: the loss is nan.*3 steps before it"):
        trainer.fit([text(60)])
    assert checkpoint.latest(run).name == "step-00000008"


def test_a_leap_rewinds_and_passes_by_the_data(run, tokenizer):
    settings = {"steps": WARM + 15, "rewind": 8.0, "checkpoint_every": 8, "lr": 1e-4}
    trainer, calls = run_with(
        tokenizer, run, lambda call: 1000.0 if call == WARM + 5 else 1.0, **settings
    )
    trainer.fit([text(60)])
    log = read_log(run / "log.jsonl")
    (line,) = [line for line in log if "rewound_to" in line]
    assert (line["step"], line["rewound_to"]) == (WARM + 6, 24)
    assert line["spike"] > 100
    assert len(calls) == settings["steps"] + WARM + 6 - 24
    # What was read since the checkpoint is not read again.
    again = calls[WARM + 6]
    assert not any(torch.equal(again, before) for before in calls[24 : WARM + 6])
    assert all(p.abs().max() < 10 for p in trainer.model.parameters())


def test_a_leap_before_there_is_a_checkpoint_is_told(run, tokenizer):
    settings = {"steps": WARM + 8, "rewind": 8.0, "checkpoint_every": 0, "lr": 1e-4}
    trainer, calls = run_with(
        tokenizer, run, lambda call: 1000.0 if call == WARM + 5 else 1.0, **settings
    )
    trainer.fit([text(60)])
    (line,) = [line for line in read_log(run / "log.jsonl") if "spike" in line]
    assert (line["step"], "rewound_to" in line) == (WARM + 6, False)
    assert len(calls) == WARM + 8


def test_a_run_that_goes_on_has_its_leaps_in_the_log(run, tokenizer):
    settings = {"steps": WARM + 15, "rewind": 8.0, "checkpoint_every": 8, "lr": 1e-4}
    leap = {"spoil": lambda call: 1000.0 if call == WARM + 5 else 1.0, **settings}
    run_with(tokenizer, run / "whole", **leap)[0].fit([text(60)])
    cut, _ = run_with(tokenizer, run / "cut", **leap)

    def stop(trainer, record):
        if record["step"] == WARM + 9 and checkpoint.latest(run / "cut").name.endswith("32"):
            raise KeyboardInterrupt

    cut.callbacks = [stop]
    with pytest.raises(KeyboardInterrupt):
        cut.fit([text(60)])
    again, _ = run_with(tokenizer, run / "cut", **{**leap, "spoil": lambda call: 1.0})
    again.fit([text(60)], resume=True)
    logs = [read_log(run / name / "log.jsonl") for name in ("whole", "cut")]
    whole, cut = ([{k: v for k, v in line.items() if k not in TIMES} for line in x] for x in logs)
    assert cut == whole
    steps = [line["step"] for line in standing(whole) if "lr" in line]
    assert steps == list(range(1, WARM + 16))


def test_leaps_without_end_stop_the_run(run, tokenizer):
    settings = {"steps": 60, "rewind": 8.0, "checkpoint_every": 5, "skips": 2, "lr": 1e-4}
    trainer, _ = run_with(
        tokenizer, run, lambda call: 1000.0 if call > WARM + 5 else 1.0, **settings
    )
    with pytest.raises(PolyheadError, match="rewound 2 times before"):
        trainer.fit([text(60)])


def test_an_outlier_is_brought_back(run, tokenizer):
    big = WARM + 4
    norms = {}
    for zclip in (0.0, 2.5):
        trainer, _ = run_with(
            tokenizer, run / str(zclip), lambda call: 50.0 if call == big else 1.0,
            steps=big + 1, zclip=zclip, clip=0.0, lr=1e-4,
        )  # fmt: skip
        trainer.fit([text(60)])
        state = open_checkpoint(checkpoint.latest(run / str(zclip)) / "trainer")
        moments = [state[name] for name in state if name.startswith("exp_avg.")]
        clipped = [
            line["clipped"]
            for line in read_log(run / str(zclip) / "log.jsonl")
            if "clipped" in line
        ]
        assert sum(clipped[WARM:]) >= 1 if zclip else not clipped
        norms[zclip] = math.sqrt(sum(float(m.square().sum()) for m in moments))
    assert norms[2.5] < norms[0.0] / 5


def test_averages_are_those_of_the_last_values():
    draw = random.Random(0)
    values = [draw.gauss(3.0, 0.5) for _ in range(2000)]
    average = Average()
    for value in values:
        average.add(value)
    assert average.mean == pytest.approx(statistics.mean(values[-200:]), abs=0.15)
    assert math.sqrt(average.variance) == pytest.approx(0.5, abs=0.15)
    assert average.score(average.mean) == 0
    assert Average().score(1e9) == 0


def test_a_guard_goes_on_where_it_was():
    guard = Guard(TrainConfig(zclip=2.5))
    for value in range(40):
        guard.limit(1 + value % 3)
        guard.is_spike(2 + value % 5)
    again = Guard(TrainConfig(zclip=2.5), guard.state())
    assert again.limit(50.0) == guard.limit(50.0) < 10
    assert again.state() == guard.state()


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (3, "batch_size = 2 and accumulate = 4 make the same step, and fit"),
        (4, "batch_size = 4 and accumulate = 2 make"),
        (0, "no smaller one does: lower context, or set recompute = blocks"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=["gpu", "cpu"],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(
    run, tokenizer, fits, said, error
):
    def objective(model, batch):
        if len(batch.labels) > fits:
            raise error
        return causal_lm(model, batch)

    config = TrainConfig(out=str(run), **{**SETTINGS, "batch_size": 8, "accumulate": 1})
    trainer = Trainer(
        tiny(tokenizer.vocab_size), tokenizer, config, objective=objective, quiet=True
    )
    with pytest.raises(PolyheadError, match=f"batch_size = 8 does not fit into memory.*{said}"):
        trainer.fit([text(60)])
    assert all(p.grad is None for p in trainer.model.parameters())


def test_other_errors_are_not_taken_for_it(run, tokenizer):
    def objective(model, batch):
        raise RuntimeError("shapes do not match")

    config = TrainConfig(out=str(run), **SETTINGS)
    trainer = Trainer(
        tiny(tokenizer.vocab_size), tokenizer, config, objective=objective, quiet=True
    )
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.fit([text(60)])


def test_a_lost_disk_is_said_at_once(run, tokenizer):
    trainer, calls = run_with(tokenizer, run, lambda call: 1.0)

    def fill(trainer, record):
        raise_at_next = open("/dev/full", "w")  # noqa: SIM115 (the log's own from here on)
        logs[-1]._file = raise_at_next

    logs = []
    begin = trainer._begin
    trainer._begin = lambda *given: logs.append(begin(*given)) or logs[-1]
    trainer.callbacks = [fill]
    with pytest.raises(FileError, match=r"full cannot be written \(No space left"):
        trainer.fit([text(60)])
    assert len(calls) == 2
