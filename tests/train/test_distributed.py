"""Several processes on one machine make the run of one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tests.train.launching import LLAMA, SIZES, assert_near, launch, losses, run, run_jobs, state

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.train import checkpoint, random_state
from polyhead.train.config import TrainConfig
from polyhead.train.distributed import Parallel
from polyhead.train.objectives import causal_lm
from polyhead.train.ranks import Ranks, joined
from polyhead.train.shards import read_parts, shapes_of, write_parts

from .conftest import tiny

CASES = {
    "ddp": ({}, {"parallel": "ddp"}, 1e-5),
    "fsdp": ({}, {"parallel": "fsdp"}, 1e-5),
    "fsdp-tied-llama": (
        {**LLAMA, "sizes": {**LLAMA["sizes"], "tie_embeddings": True}},
        {"parallel": "fsdp", "recompute": "blocks", "ema": 0.9}, 1e-5,
    ),
    "ddp-muon-bfloat16": ({}, {"optimizer": "muon", "dtype": "bfloat16", "ema": 0.9}, 2e-2),
    "fsdp-schedule-free": ({}, {"parallel": "fsdp", "optimizer": "schedule-free"}, 1e-5),
    "ddp-pruned": (
        {"teacher": "self"}, {"prune": 0.5, "prune_every": 2, "ema": 0.9}, 1e-5,
    ),
    "ddp-lora-dpo": (
        {**LLAMA, "lora": True, "objective": "dpo"},
        {"parallel": "ddp", "context": 40, "held_out": 0.2, "validate_every": 1}, 1e-5,
    ),
    "fsdp-lora": ({**LLAMA, "lora": True}, {"parallel": "fsdp"}, 1e-5),
    "fsdp-replaced-token": (
        {"family": "deberta-v2", "head": "rtd", "objective": "replaced-token",
         "sizes": {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                   "dropout": 0.0, "attention_dropout": 0.0}},
        {"parallel": "fsdp", "batch_size": 4, "accumulate": 2}, 2e-4,
    ),
}  # fmt: skip


DROPOUT = {"sizes": {**SIZES, "dropout": 0.2}, "config": {"parallel": "fsdp"}}


def told(folder: Path, name: str, **more):
    job, settings, _ = CASES[name]
    return {**job, "config": {**settings, "out": str(folder / name), **more}}


def dropping(folder: Path, name: str, **more):
    settings = {**DROPOUT["config"], "out": str(folder / name), **more}
    return {**DROPOUT, "config": settings, "resume": True}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left their runs."""
    folder = tmp_path_factory.mktemp("two")
    again = {**told(folder, "ddp"), "raises": "already holds a run"}
    full = {**told(folder, "fsdp", out=str(folder / "full")), "full": "1"}
    launch(2, [
        *(told(folder, name) for name in CASES),
        told(folder, "fsdp", steps=3, out=str(folder / "cut")),
        dropping(folder, "dropout"),
        dropping(folder, "dropout-cut", steps=4), dropping(folder, "dropout-cut"),
        again, {**full, "raises": "rank 1: No space left on device"},
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def four(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks wrote again what two had saved, and went on with what one had."""
    run(told(two, "fsdp", steps=5, out=str(two / "cut")) | {"resume": True, "seed": 1})
    folder = tmp_path_factory.mktemp("four")
    job = told(two, "fsdp", out=str(two / "cut")) | {"resume": True, "seed": 2}
    again = {"from": str(checkpoint.latest(two / "fsdp")), "to": str(folder)}
    launch(4, [job, again], "test_distributed:go_on_and_copy")
    return folder


def go_on_and_copy() -> None:
    """What each of the four does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    *jobs, last = json.loads(sys.argv[1])
    run_jobs(jobs)
    mesh, parts = init_device_mesh("cpu", (4,)), {}
    for name, shape in shapes_of(Path(last["from"]) / "trainer").items():
        parts[name] = torch.empty(shape)
        if shape:
            parts[name] = distribute_tensor(parts[name], mesh, [Shard(0)])
    read_parts(Path(last["from"]) / "trainer", parts)
    # Of two rows two ranks have nothing.
    small = distribute_tensor(torch.arange(2.0), mesh, [Shard(0)])
    write_parts(Path(last["to"]), {**parts, "small": small})
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_run_of_one(two, tmp_path, name):
    run(told(tmp_path, name))
    assert_near(tmp_path / name, two / name, CASES[name][2])


def test_a_run_goes_on_with_any_number_of_ranks(two, four, tmp_path):
    """Saved by two, taken up by one, and that by four: the loss curve of one all along."""
    run(told(tmp_path, "fsdp"))
    assert_near(tmp_path / "fsdp", two / "cut")


def test_parts_are_the_same_bit_for_bit_whoever_wrote_them(two, four):
    """Four ranks read what two had written, and write it again."""
    saved = checkpoint.latest(two / "fsdp")
    assert saved is not None
    names = {path.name for path in (saved / "trainer").iterdir()}
    assert sum(name.startswith("shard-") for name in names) == 2
    assert "model.safetensors" not in names
    assert len(list(four.glob("shard-*"))) == 4
    once = state(saved)
    once["small"] = torch.arange(2.0)
    again = {name: torch.empty_like(tensor) for name, tensor in once.items()}
    read_parts(four, again)
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name


def test_the_model_of_a_sharded_run_is_one_that_loads(two):
    last = checkpoint.latest(two / "fsdp-tied-llama")
    assert last is not None
    model, kept = ph.load(last), state(last)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[f"average.{name}"]), name


def test_dropout_is_the_same_after_a_stop_and_on_other_ranks(two, tmp_path):
    run(dropping(tmp_path, "dropout"))
    assert losses(two / "dropout") == losses(two / "dropout-cut")
    assert losses(two / "dropout") == pytest.approx(losses(tmp_path / "dropout"), abs=1e-5)
    assert len(losses(two / "dropout")) == 8


def test_every_rank_keeps_its_own_random_numbers(tmp_path):
    drawn = []
    for rank in range(2):
        ranks = Ranks(rank, 2)
        random_state.seed(7, ranks)
        random_state.keep(tmp_path, ranks)
        drawn.append(float(torch.rand(())))
    assert drawn[0] != drawn[1]
    for rank in range(2):
        random_state.take_up(tmp_path, Ranks(rank, 2), 7, 5)
        assert float(torch.rand(())) == drawn[rank]
    for rank in range(6):  # in three groups, of which the last is new
        random_state.take_up(tmp_path, Ranks(rank, 6, 2), 7, 5)
        drawn.append(float(torch.rand(())))
    first, second, *found = drawn
    assert found[:4] == [first, first, second, second]
    assert found[4] == found[5]
    assert found[4] not in (first, second)


def test_one_rank_that_cannot_write_is_one_line_on_all_and_leaves_nothing(two):
    assert not list((two / "full" / "checkpoints").iterdir())


def test_other_ranks_than_saved_a_run_are_named(tmp_path, capsys):
    job = told(tmp_path, "ddp", steps=4) | {"quiet": False, "resume": True}
    run(job)
    last = checkpoint.latest(tmp_path / "ddp")
    said = last / "trainer" / "state.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"ranks": [6, 2]}))
    manifest = json.loads((last / "manifest.json").read_text())
    del manifest["files"]["trainer/state.json"]
    (last / "manifest.json").write_text(json.dumps(manifest))
    run(told(tmp_path, "ddp") | {"quiet": False, "resume": True})
    told_so = "saved by 6 processes in groups of 2, goes on with 1 process: the steps are the same"
    assert told_so in capsys.readouterr().err


def test_parts_of_matrices_are_not_pruned():
    config = TrainConfig(prune=0.5, parallel="fsdp")
    with pytest.raises(ConfigError, match="pruning needs whole: use ddp"):
        Parallel(tiny(20), causal_lm, config, Ranks(0, 2), torch.device("cpu"))


def test_what_cannot_be_shared_is_refused():
    assert list(Ranks(1, 2).share(range(8, 12))) == [9, 11]
    assert list(Ranks(3, 4, 2).share(range(8, 12))) == [9, 11]
    with pytest.raises(
        ConfigError,
        match=r"3 processes cannot share the 4 batches.*start 1 or 2 or 4.*multiple of 3",
    ):
        Ranks(0, 3).share(range(4))
    with pytest.raises(ConfigError, match=r"2 groups of 3 .* cannot share the 1 batches.*start 3,"):
        Ranks(0, 6, 3).share(range(1))
    assert Ranks().sum([1.5, 2.0]) == [1.5, 2.0]
    with pytest.raises(ConfigError, match="tensor is 2, and there is 1 process"):
        joined("cpu", tensor=2)
