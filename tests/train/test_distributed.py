"""Several processes on one machine make the run of one."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from polyhead.errors import ConfigError
from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.ranks import Ranks
from polyhead.train.log import read_log

# A run of its own in every process; what it is told stands in one line of JSON.
CHILD = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import polyhead as ph
from polyhead.text.tokenizer import Tokenizer
told = json.loads(sys.argv[1])
WORDS = "the cat sat on a mat and saw that it was flat".split()
draw = torch.Generator().manual_seed(0)
rows = torch.randint(len(WORDS), (60, 6), generator=draw).tolist()
text = "".join(" ".join(WORDS[i] for i in row) + ".\\n" for row in rows)
tokenizer = Tokenizer.train([text], kind="chars")
model = ph.build(told["family"], seed=told.get("seed", 0), vocab_size=tokenizer.vocab_size,
                 **told["sizes"])
if told.get("lora"):
    torch.manual_seed(0)
    ph.add_adapter(model, ph.LoraConfig(rank=2, targets="all-linear"))
config = ph.TrainConfig(**told["config"])
options = told.get("options", {{}})
trainer = ph.Trainer(model, tokenizer, config, objective=told["objective"], options=options,
                     quiet=True)
data = [text]
if told["objective"] == "dpo":
    data = [{{"prompt": f"the {{a}}", "chosen": "sat on", "rejected": f"saw {{a}}"}} for a in WORDS]
    data = data * 3
trainer.fit(data, resume=told.get("resume", False))
if told["objective"] == "causal-lm":
    assert not torch.isnan(model(torch.tensor([[1, 2, 3]]))).any()
"""
CONFIG = dict(
    steps=8, batch_size=2, accumulate=4, context=16, warmup=2, log_every=1, checkpoint_every=4,
    validate_every=4, validate_batches=2, lr=5e-3, schedule="constant", device="cpu",
)  # fmt: skip
SIZES = dict(d_model=16, num_layers=2, num_heads=2, max_seq_len=64)


def launch(tmp_path: Path, world: int, **told) -> None:
    told = {"family": "gpt2", "sizes": SIZES, "objective": "causal-lm", **told}
    told["config"] = {**CONFIG, **told["config"]}
    source = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent))
    if world == 1:  # here, as starting a process is what takes the time
        with patch.object(sys, "argv", ["child", json.dumps(told)]):
            exec(source, {})
        return
    script = tmp_path / "child.py"
    script.write_text(source)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **place}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), json.dumps(told)], stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        for child in running:
            _, errors = child.communicate(timeout=400)
            assert child.returncode == 0, errors[-3000:]
    finally:
        for child in running:
            child.kill()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(out)
    assert last is not None
    found = {f"trainer.{n}": t for n, t in open_checkpoint(last / "trainer").items()}
    return {**found, **dict(open_checkpoint(last).items())} if list(last.glob("model*")) else found


def assert_near(one: Path, other: Path, limit: float = 1e-5) -> None:
    assert len(losses(one)) == len(losses(other)) == 8
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a == pytest.approx(b, abs=limit)
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if "rng" not in name:
            assert torch.allclose(tensor, theirs[name], atol=10 * limit), name


CASES = {
    "ddp": ({}, {"parallel": "ddp"}, 1e-5),
    "fsdp": ({}, {"parallel": "fsdp"}, 1e-5),
    "fsdp-tied-llama": (
        {"family": "llama", "sizes": {**SIZES, "d_ff": 24, "tie_embeddings": True}},
        {"parallel": "fsdp", "recompute": "blocks", "ema": 0.9}, 1e-5,
    ),
    "ddp-muon-bfloat16": ({}, {"optimizer": "muon", "dtype": "bfloat16", "ema": 0.9}, 2e-2),
    "ddp-lora-dpo": (
        {"family": "llama", "sizes": {**SIZES, "d_ff": 24}, "lora": True, "objective": "dpo"},
        {"parallel": "ddp", "context": 40, "held_out": 0.2, "validate_every": 1}, 1e-5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_run_of_one(tmp_path, name):
    told, settings, limit = CASES[name]
    for world in (1, 2):
        config = {**settings, "out": str(tmp_path / str(world))}
        launch(tmp_path, world, config=config, **told)
    assert_near(tmp_path / "1", tmp_path / "2", limit)


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path):
    """Saved by two, taken up by one, and that by four: the loss curve of one all along."""
    settings = {"parallel": "fsdp"}
    launch(tmp_path, 1, config={**settings, "out": str(tmp_path / "whole")})
    for world, steps in ((2, 3), (1, 5), (4, 8)):
        config = {**settings, "steps": steps, "out": str(tmp_path / "cut")}
        launch(tmp_path, world, config=config, resume=True, seed=world - 2)
    assert_near(tmp_path / "whole", tmp_path / "cut")


def test_batches_that_cannot_be_shared_are_refused():
    assert list(Ranks(1, 2).share(range(8, 12))) == [9, 11]
    with pytest.raises(ConfigError, match=r"3 processes share the 4 batches.*multiple of 3"):
        Ranks(0, 3).share(range(4))
    assert Ranks().sum([1.5, 2.0]) == [1.5, 2.0]
