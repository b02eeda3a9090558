"""What the processes of the campaigns do: train a tiny model, and perhaps die at a set moment."""

import os
import random
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polyhead as ph
from polyhead.cli.main import main
from polyhead.train import loop
from polyhead.train.objectives import Loss, causal_lm

TEXT = "the cat sat on a mat and saw that it was flat. " * 60
CONFIG: dict[str, Any] = dict(
    steps=200, batch_size=2, accumulate=2, context=32, warmup=10, log_every=5, validate_every=50,
    validate_batches=2, checkpoint_every=7, device="cpu",
)  # fmt: skip
SIZES = dict(d_model=32, num_layers=2, num_heads=2, max_seq_len=64)
ROWS = [{"prompt": f"the cat {n}", "answer": "sat on a mat"} for n in "abcdefghij" * 6]


def at(place: dict[str, str], work: Callable[..., None], *given: Any) -> None:
    """`work(*given)` as the rank of that environment."""
    os.environ.update(place)
    torch.set_num_threads(1)
    work(*given)


def train(told: dict[str, Any]) -> None:
    """A run from its newest checkpoint, or its beginning. SystemExit 143 where it is terminated.

    told: `config` beside CONFIG; `objective`; `die_at`, the touch of the disk that kills it;
    `count`, a file for the number of touches; `ready`, one that is made before the first step;
    `spoilt`, steps to be left out, counted from here.
    """
    config = ph.TrainConfig(**{**CONFIG, **told["config"]})
    touches = watch(Path(config.out).resolve(), told.get("die_at", 0))
    trainer, data = TRAINERS[told.get("objective", "causal-lm")](config)
    trainer.callbacks = [draw]
    if "ready" in told:
        loop.signals = telling(Path(told["ready"]))
    if "spoilt" in told:
        trainer.objective = spoilt(trainer.model, set(told["spoilt"]), config.accumulate)
    trainer.fit(data, resume=True)
    if "count" in told and os.environ["RANK"] == "0":
        Path(told["count"]).write_text(str(touches[0]))


def command(words: list[str], said: str) -> None:
    """`polyhead WORDS`, which says to the file `said` what it would have printed."""
    rank = os.environ["RANK"]
    file = os.open(f"{said}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(main(words))


def telling(ready: Path) -> Any:
    """`signals` of the loop, which makes a file once it listens."""
    listen = loop.signals

    @contextmanager
    def told() -> Generator[list[int]]:
        with listen() as received:
            ready.touch()
            yield received

    return told


def draw(trainer: Any, record: dict[str, Any]) -> None:
    """Python's and numpy's generators go on with the log, so that they have a state to lose."""
    random.random(), np.random.random()


def watch(out: Path, die_at: int) -> list[int]:
    """Counts what touches the disk below `out`; SIGKILL just before the `die_at`-th time."""
    count = [0]
    changes = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")

    def touch() -> None:
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            is_ours = str(path).startswith(str(out)) if isinstance(path, str | Path) else False
            if is_ours and flags & (os.O_WRONLY | os.O_RDWR):
                touch()
        elif event in changes:
            touch()

    sync = os.fsync

    def synced(file: Any) -> None:
        touch()
        sync(file)

    os.fsync = synced
    sys.addaudithook(hear)
    return count


def spoilt(model: Any, steps: set[int], accumulate: int) -> Any:
    """Causal LM whose loss is no number at those steps, counted from the start of this process."""
    calls = 0

    def objective(model: Any, batch: Any) -> Loss:
        nonlocal calls
        loss = causal_lm(model, batch)
        if not model.training:
            return loss
        factor = float("nan") if calls // accumulate in steps else 1.0
        calls += 1
        return Loss(loss.total * factor, loss.tokens, {"loss": loss.total.detach() * factor})

    return objective


def language(config: ph.TrainConfig) -> tuple[ph.Trainer, list[Any]]:
    tokenizer = ph.Tokenizer.train([TEXT], kind="chars")
    model = ph.build("gpt2", seed=0, vocab_size=tokenizer.vocab_size, dropout=0.1, **SIZES)
    return ph.Trainer(model, tokenizer, config, quiet=True), [TEXT]


def masked(config: ph.TrainConfig) -> tuple[ph.Trainer, list[Any]]:
    tokenizer = ph.Tokenizer.train([TEXT], kind="wordpiece", vocab_size=100)
    sizes = {**SIZES, "d_ff": 64, "dropout": 0.1}
    model = ph.build("bert", head="lm", seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    return ph.Trainer(model, tokenizer, config, objective="masked-lm", quiet=True), [TEXT] * 8


def chat(config: ph.TrainConfig) -> tuple[ph.Trainer, list[Any]]:
    tokenizer = ph.Tokenizer.train([str(ROWS)], kind="chars")
    sizes = {**SIZES, "d_ff": 64}
    model = ph.build("llama", seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    torch.manual_seed(0)
    ph.add_adapter(model, ph.LoraConfig(rank=2, targets="all-linear", dropout=0.1))
    return ph.Trainer(model, tokenizer, config, objective="chat", quiet=True), ROWS


TRAINERS = {"causal-lm": language, "masked-lm": masked, "chat": chat}
