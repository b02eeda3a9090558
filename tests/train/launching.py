"""Runs in several processes on one machine, as torchrun starts them.

What takes the time is to start a process: those of one `launch` make several runs, one after the
other, and a run of one process is made here.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import polyhead as ph
from polyhead.errors import PolyheadError
from polyhead.files.safetensors import open_checkpoint
from polyhead.text.tokenizer import Tokenizer
from polyhead.train import checkpoint
from polyhead.train.log import read_log
from polyhead.train.shards import read_parts, shapes_of

CONFIG = dict(
    steps=8, batch_size=2, accumulate=4, context=16, warmup=2, log_every=1, checkpoint_every=4,
    validate_every=4, validate_batches=2, lr=5e-3, schedule="constant", device="cpu",
)  # fmt: skip
SIZES = dict(d_model=16, num_layers=2, num_heads=2, max_seq_len=64)
LLAMA = {"family": "llama", "sizes": {**SIZES, "d_ff": 24}}
WORDS = "the cat sat on a mat and saw that it was flat".split()
Told = Mapping[str, Any]


def run(told: Told) -> ph.Trainer:
    """One run, in this process or this rank of several."""
    told = {"family": "gpt2", "sizes": SIZES, "objective": "causal-lm", **told}
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (60, 6), generator=draw).tolist()
    text = "".join(" ".join(WORDS[i] for i in row) + ".\n" for row in rows)
    kind = "wordpiece" if told["objective"] == "replaced-token" else "chars"
    tokenizer = Tokenizer.train([text] * 3, kind=kind)
    model = ph.build(
        told["family"], seed=told.get("seed", 0), head=told.get("head"),
        vocab_size=tokenizer.vocab_size, **told["sizes"],
    )  # fmt: skip
    if told.get("lora"):
        torch.manual_seed(0)
        ph.add_adapter(model, ph.LoraConfig(rank=2, targets="all-linear"))
    trainer = ph.Trainer(
        model, tokenizer, ph.TrainConfig(**{**CONFIG, **told["config"]}),
        objective=told["objective"], teacher=told.get("teacher"), quiet=told.get("quiet", True),
    )  # fmt: skip
    data: Any = [text]
    if told["objective"] == "dpo":
        pairs = [{"prompt": f"the {a}", "chosen": "sat on", "rejected": f"saw {a}"} for a in WORDS]
        data = pairs * 3
    trainer.fit(data, resume=told.get("resume", False))
    if told["objective"] == "causal-lm":
        assert not torch.isnan(trainer.model(torch.tensor([[1, 2, 3]]))).any()
    return trainer


def launch(world: int, jobs: Sequence[Told], work: str = "launching:run_all") -> None:
    """Let `world` processes do all jobs by `work`, a module of this folder and a function of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, _, function = work.partition(":")
    code = f"from tests.train.{module} import {function}; {function}()"
    paths = [str(Path(__file__).parents[2]), *sys.path]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    environment = {
        **os.environ, **place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(jobs)], stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for child in children:
            _, errors = child.communicate(timeout=250)
            assert child.returncode == 0, errors[-3000:]
    finally:
        for child in children:
            child.kill()


def run_all() -> None:
    """What a child does."""
    run_jobs(json.loads(sys.argv[1]))
    torch.distributed.destroy_process_group()


def run_jobs(jobs: Sequence[Told]) -> None:
    """One after the other, also those that end with a line on all ranks."""
    torch.set_num_threads(1)
    for job in jobs:
        with full_disk() if os.environ["RANK"] == job.get("full") else nullcontext():
            if "raises" not in job:
                run(job)
                continue
            with pytest.raises(PolyheadError, match=job["raises"]) as error:
                run(job)
            assert "\n" not in str(error.value)


@contextmanager
def full_disk() -> Generator[None]:
    """DCP finds no room."""

    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    with patch("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full):
        yield


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line]


def state(saved: Path) -> dict[str, torch.Tensor]:
    """What the optimizer of a run kept, whole, whoever wrote it."""
    whole = {
        name: torch.empty(shape, dtype=torch.bool if name.startswith("pruned.") else torch.float32)
        for name, shape in shapes_of(saved / "trainer").items()
    }
    read_parts(saved / "trainer", whole)
    return whole


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint of a run holds."""
    last = checkpoint.latest(out)
    assert last is not None
    found = {f"trainer.{name}": tensor for name, tensor in state(last).items()}
    return {**found, **dict(open_checkpoint(last).items())} if list(last.glob("model*")) else found


def assert_near(one: Path, other: Path, limit: float = 1e-5, steps: int = 8) -> None:
    """The curves of two runs, and all that they leave, are the same."""
    assert len(losses(one)) == len(losses(other)) == steps
    for a, b in zip(losses(one), losses(other), strict=True):
        assert abs(a - b) <= limit
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    # What follows from others is written to the model when a process by itself saves it.
    derived = "trainer.model.discriminator.backbone.embedding.weight"
    ours.pop(derived, None)
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            gap = float((tensor - theirs[name]).abs().max()) if tensor.numel() else 0.0
            assert gap <= 10 * limit, f"{name}: {gap}"
        else:
            assert torch.equal(tensor, theirs[name]), name
