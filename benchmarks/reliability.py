"""Training that is killed, stopped, filled up and repeated, beside a run that nobody disturbed.

Each campaign trains a tiny GPT in processes of its own and compares what they leave, bit for bit:
weights, moments, random states and the log but for its times. The CI tier is 10 rounds; --rounds
200 is the long one. Figures belong into docs/reliability.md.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from polyhead.files.safetensors import open_checkpoint
from polyhead.train import checkpoint
from polyhead.train.log import TIMES, read_log

CHILD = """
import json, sys, torch
torch.set_num_threads(1)
import polyhead as ph
told = json.loads(sys.argv[1])
text = "the cat sat on a mat and saw that it was flat. " * 60
tokenizer = ph.Tokenizer.train([text], kind="chars")
model = ph.build("gpt2", seed=0, vocab_size=tokenizer.vocab_size, d_model=32, num_layers=2,
                 num_heads=2, max_seq_len=64, dropout=told.get("dropout", 0.1))
config = ph.TrainConfig(**told["config"])
print("ready", flush=True)
ph.Trainer(model, tokenizer, config, quiet=True).fit([text], resume=True)
"""
CONFIG = dict(
    steps=400, batch_size=2, accumulate=2, context=32, warmup=10, log_every=5, validate_every=50,
    validate_batches=2, checkpoint_every=7, device="cpu",
)  # fmt: skip


class Child:
    """A run on so many processes, from its beginning or its newest checkpoint."""

    def __init__(self, out: Path, world: int, **settings: Any) -> None:
        # Ranks draw their dropout apart: bits are compared without.
        told = {"config": {**CONFIG, **settings, "out": str(out)}, "dropout": 0.1 * (world == 1)}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **place}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, json.dumps(told)], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]  # fmt: skip
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()

    def send(self, number: int) -> None:
        """A signal to every process."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """The first one's exit status, once all are gone."""
        for process in self.processes:
            process.communicate()
        return self.processes[0].returncode


def left(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a run left: tensors, and its log without times."""
    last = checkpoint.latest(out)
    assert last is not None
    tensors = {f"trainer.{n}": t.clone() for n, t in open_checkpoint(last / "trainer").items()}
    tensors |= {name: tensor.clone() for name, tensor in open_checkpoint(last).items()}
    log = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_log(out / "log.jsonl")
    ]
    return tensors, log


def alike(one: Any, other: Any) -> bool:
    """Bit for bit."""
    tensors, log = one
    theirs, their_log = other
    same = tensors.keys() == theirs.keys() and log == their_log
    return same and all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())


def killed(folder: Path, rounds: int, world: int, number: int) -> dict[str, Any]:
    """Stopped by a signal at random moments until it has been so often, then left to end."""
    began = time.perf_counter()
    Child(folder / "whole", world).wait()
    whole, length = left(folder / "whole"), time.perf_counter() - began
    draw, codes, waits = random.Random(0), list[int](), list[float]()
    done = runs = 0
    same = True
    while done < rounds:
        runs += 1
        out = folder / f"cut-{runs}"
        while True:
            child = Child(out, world)
            # From the first steps to the last of what a whole run takes, its start not counted.
            time.sleep(draw.uniform(0, 0.4 * length))
            if done < rounds and child.processes[0].poll() is None:
                sent = time.perf_counter()
                child.send(number)
                codes.append(child.wait())
                waits.append(time.perf_counter() - sent)
                done += 1
            elif child.wait() == 0:
                break
        same = same and alike(left(out), whole)
    return {
        "signals": done, "runs": runs, "bit_identical": same, "exit_codes": sorted(set(codes)),
        "longest_seconds_to_exit": round(max(waits), 2),
    }  # fmt: skip


def repeated(folder: Path, rounds: int, world: int) -> dict[str, Any]:
    """The same seed so often."""
    found = []
    for number in range(rounds):
        Child(folder / str(number), world, steps=60).wait()
        found.append(left(folder / str(number)))
    return {"runs": rounds, "bit_identical": all(alike(found[0], other) for other in found[1:])}


CAMPAIGNS: Mapping[str, Callable[[Path, int], dict[str, Any]]] = {
    "kill": lambda folder, rounds: killed(folder, rounds, 1, signal.SIGKILL),
    "kill-two-ranks": lambda folder, rounds: killed(folder, rounds, 2, signal.SIGKILL),
    "terminate": lambda folder, rounds: killed(folder, rounds, 1, signal.SIGTERM),
    "repeat": lambda folder, rounds: repeated(folder, rounds, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS), help=", ".join(CAMPAIGNS))
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    for name in given.campaigns:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = CAMPAIGNS[name](Path(folder), given.rounds)
        minutes = round((time.perf_counter() - began) / 60, 1)
        print(json.dumps({"campaign": name, **found, "minutes": minutes}), flush=True)


if __name__ == "__main__":
    main()
