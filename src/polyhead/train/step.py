"""One optimizer step, what a sample is, and how a signal ends a run."""

import math
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead.errors import DataError
from polyhead.models.model import TaskModel
from polyhead.train.config import TrainConfig
from polyhead.train.objectives import Objective
from polyhead.train.optim import Masters, NotFiniteError
from polyhead.train.ranks import Ranks

ALONE = Ranks()


class Interrupted(SystemExit):
    """SIGINT or SIGTERM stopped the run after a whole step, with a checkpoint.

    `code` is 130 or 143, and the process exits with it unless this is caught; `resume` goes on.
    """

    def __init__(self, signum: int, step: int, saved: Path) -> None:
        super().__init__(128 + signum)
        self.step, self.checkpoint = step, saved

    def __str__(self) -> str:
        return f"stopped after step {self.step}; saved in {self.checkpoint}"


def train_step(
    model: nn.Module,
    optimizer: Masters,
    objective: Objective,
    batches: Sequence[Any],
    lr: float,
    limit: Callable[[float], float] | None = None,
    ranks: Ranks = ALONE,
    seeds: Sequence[int] | None = None,
) -> tuple[dict[str, float], float, int]:
    """One optimizer step over batches: sums of the loss's parts, the gradient's norm, tokens.

    Every gradient is divided by the tokens of the whole step, so 4 batches of 2 rows make the step
    of one batch of 8. limit: as in `Masters.step`. ranks: those that share the step, each with
    batches of its own; sums are of all of them. seeds: what the dropout of each batch is drawn
    from; without them the generator goes on. A loss, a gradient or a moment that is not finite
    raises NotFiniteError and changes no weight.
    """
    (tokens,) = ranks.sum([sum(batch.tokens() for batch in batches)])
    if tokens == 0:
        raise DataError("no label of this step counts: every one is masked")
    sums: dict[str, float] = {}
    worst = 0.0
    for number, batch in enumerate(batches):
        if seeds is not None:
            torch.manual_seed(seeds[number])
        loss = objective(model, batch)
        (loss.total / tokens).backward()
        for name, part in (loss.parts or {"loss": loss.total.detach()}).items():
            sums[name] = sums.get(name, 0.0) + float(part)
        total = float(loss.total.detach())
        worst = worst if math.isfinite(total) else total
        if not math.isfinite(worst) and ranks.world == 1:
            break
        optimizer.collect()
    broken = not optimizer.moments_are_finite()
    *parts, worst, broken = ranks.sum([*sums.values(), worst, broken])
    if broken:
        optimizer.discard()
        raise NotFiniteError("a moment of the optimizer is no number")
    if not math.isfinite(worst):
        optimizer.discard()
        raise NotFiniteError(f"the loss is {worst}: lower lr, raise warmup, or check the data")
    found = dict(zip(sums, parts, strict=True))
    return found, optimizer.step(lr, limit), int(tokens)


def write_sample(model: TaskModel, tokenizer: Any, config: TrainConfig) -> str:
    """`sample_prompt` continued by the model, at temperature 0.8."""
    from polyhead.generate.config import GenerationConfig
    from polyhead.generate.generator import TextGenerator

    settings = GenerationConfig(
        max_new_tokens=config.sample_tokens, temperature=0.8, seed=config.seed
    )
    prompt = config.sample_prompt or "\n"
    return config.sample_prompt + str(TextGenerator(model, tokenizer).generate(prompt, settings))


@contextmanager
def signals() -> Generator[list[int]]:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one acts as usual.

    Only a program's main thread may do so; elsewhere signals are left as they are.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    try:
        for kind in kinds:
            signal.signal(kind, note)
        yield received
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
