"""Several processes on one machine make the run of one."""

import json
from pathlib import Path

import pytest
import torch
from launching import LLAMA, SIZES, assert_near, launch, losses, run, state, tensors

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.train import checkpoint
from polyhead.train.ranks import Ranks, joined

CASES = {
    "ddp": ({}, {"parallel": "ddp"}, 1e-5),
    "fsdp": ({}, {"parallel": "fsdp"}, 1e-5),
    "fsdp-tied-llama": (
        {**LLAMA, "sizes": {**LLAMA["sizes"], "tie_embeddings": True}},
        {"parallel": "fsdp", "recompute": "blocks", "ema": 0.9}, 1e-5,
    ),
    "ddp-muon-bfloat16": ({}, {"optimizer": "muon", "dtype": "bfloat16", "ema": 0.9}, 2e-2),
    "ddp-lora-dpo": (
        {**LLAMA, "lora": True, "objective": "dpo"},
        {"parallel": "ddp", "context": 40, "held_out": 0.2, "validate_every": 1}, 1e-5,
    ),
    "fsdp-lora": ({**LLAMA, "lora": True}, {"parallel": "fsdp"}, 1e-5),
    "fsdp-replaced-token": (
        {"family": "deberta-v2", "objective": "replaced-token",
         "sizes": {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                   "dropout": 0.0, "attention_dropout": 0.0}},
        {"parallel": "fsdp", "batch_size": 4, "accumulate": 2}, 2e-4,
    ),
}  # fmt: skip


def told(folder: Path, name: str, **more):
    job, settings, _ = CASES[name]
    return {**job, "config": {**settings, "out": str(folder / name), **more}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left all the runs, and the beginning of one that was cut."""
    folder = tmp_path_factory.mktemp("two")
    cut = told(folder, "fsdp", steps=3, out=str(folder / "cut"))
    launch(2, [*(told(folder, name) for name in CASES), cut])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_run_of_one(two, tmp_path, name):
    run(told(tmp_path, name))
    assert_near(tmp_path / name, two / name, CASES[name][2])
