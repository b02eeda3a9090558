"""The training loop: every family, every objective."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead.errors import ConfigError, DataError, FileError, PolyheadError
from polyhead.models.model import TaskModel, require_causal
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.corpus import Source, Tokens, load_tokens
from polyhead.train.data import Windows
from polyhead.train.evaluate import score_texts, score_tokens
from polyhead.train.log import Log, View, peak_memory, tell_tokenising
from polyhead.train.objectives import Objective, causal_lm
from polyhead.train.optim import MasterAdamW, learning_rate

Callback = Callable[["Trainer", dict[str, Any]], None]
"""Called with the trainer and each record of the log as it is written."""
Sample = Callable[[TaskModel, Any, TrainConfig], str]
"""Text by the model in its present state; random numbers it draws do not disturb the training."""


class Interrupted(SystemExit):
    """SIGINT or SIGTERM stopped the run after a whole step, with a checkpoint.

    `code` is 130 or 143, and the process exits with it unless this is caught; `resume` goes on.
    """

    def __init__(self, signum: int, step: int, saved: Path) -> None:
        super().__init__(128 + signum)
        self.step, self.checkpoint = step, saved

    def __str__(self) -> str:
        return f"stopped after step {self.step}; saved in {self.checkpoint}"


class Trainer:
    """Trains `model` in place. With dtype bfloat16 the model's own weights become bfloat16.

    objective: a function `(model, batch) -> Loss`. sample: writes a text every `sample_every`
    steps; the default continues `sample_prompt`. callbacks: see `Callback`. about: what run.json is
    to say of a run that begins. quiet: no view.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Any,
        config: TrainConfig | None = None,
        *,
        objective: Objective = causal_lm,
        sample: Sample | None = None,
        callbacks: Sequence[Callback] = (),
        about: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        require_causal(model)
        self.model, self.tokenizer = model, tokenizer
        self.config = config or TrainConfig()
        self.objective, self.sample = objective, sample or write_sample
        self.callbacks, self.about, self.quiet = callbacks, about, quiet
        self.run = Path(self.config.out)
        limit = getattr(model.config, "max_seq_len", None)
        if limit is not None and self.config.context > limit:
            raise ConfigError(
                f"context is {self.config.context}, and the model takes {limit} tokens: "
                "set context to that or less"
            )

    def fit(
        self,
        texts: Source,
        valid: Source | None = None,
        *,
        resume: bool = False,
        force: bool = False,
    ) -> dict[str, Any]:
        """Train for `config.steps` steps; the last figures, and where the last checkpoint is.

        texts, valid: strings in a list or any iterable, or the path of a text file, a .jsonl file,
        or a folder of both. Without `valid`, the last `held_out` of the tokens are for validation.
        resume: go on from the run's newest checkpoint, or begin if there is none.
        force: begin anew where a run already is; that goes once the new one is ready to start.
        Raises Interrupted on SIGINT and SIGTERM; PolyheadError when the loss is no longer finite.
        """
        self._claim(resume, force)
        device = self._device()
        self.model.to(device)
        train, held = self._corpora(texts, valid)
        windows = Windows(train, self.config.context, self.config.seed)
        torch.manual_seed(self.config.seed)
        optimizer = MasterAdamW(self.model, self.config)
        progress = checkpoint.Progress(0, self.config, train.digest)
        last = checkpoint.latest(self.run) if resume else None
        if last is not None:
            found = checkpoint.restore(last, self.model, optimizer, self.config, train.digest)
            progress = replace(found, config=self.config)
        self._begin(anew=not resume)
        checkpoint.clean(self.run)
        self.config.save(self.run / "config.toml")
        log = Log(self.run / "log.jsonl", step=progress.step)
        view = View(self.config.steps, progress.step, quiet=self.quiet)
        self.model.train()
        try:
            with view, _signals() as received:
                run = _Run(self, windows, held, optimizer, progress, log, view, device)
                return run.go(received, last)
        finally:
            log.close()
            self.model.eval()

    def evaluate(
        self, texts: Source, *, context: int | None = None, stride: int | None = None
    ) -> dict[str, float]:
        """loss (nats a token), perplexity, bits_per_byte, tokens, bytes of texts or a path.

        Every token is scored once, in sliding windows of `context` (the run's own unless given)
        that advance by `stride` (half of it unless given).
        """
        self.model.to(self._device())
        size = self.config.context if context is None else context
        batch = self.config.batch_size
        score = score_texts(
            self.model, self.tokenizer, texts, context=size, stride=stride, batch_size=batch
        )
        return score.to_dict()

    def _claim(self, resume: bool, force: bool) -> None:
        """Make the run directory; FileError where a run already is, unless told what to do.

        What a start that failed left behind is no run: it has neither checkpoint nor log line.
        """
        log = self.run / "log.jsonl"
        begun = any((self.run / "checkpoints").glob("[!.]*")) or (
            log.exists() and log.stat().st_size > 0
        )
        if begun and not (resume or force):
            raise FileError(
                f"{self.run} already holds a run: resume it, or use force or another out"
            )
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot make the run directory {self.run}: {error.strerror}") from None

    def _begin(self, anew: bool) -> None:
        """Remove what was there, if `anew`, and make what a run needs where it is missing."""
        folder, about = self.run / "checkpoints", self.run / "run.json"
        try:
            if anew:
                shutil.rmtree(folder, ignore_errors=True)
                for name in ("log.jsonl", "config.toml", "run.json"):
                    (self.run / name).unlink(missing_ok=True)
            folder.mkdir(exist_ok=True)
            if self.about is not None and not about.exists():
                about.write_text(json.dumps(self.about, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise FileError(f"cannot begin in {self.run}: {error.strerror}") from None

    def _device(self) -> torch.device:
        name = self.config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError):
            raise ConfigError(f"device is {name!r}: there is no such device here") from None

    def _corpora(self, texts: Source, valid: Source | None) -> tuple[Tokens, Tokens | None]:
        """Tokens to learn from, and those to validate on (None where the text is too short)."""
        cache = Path(self.config.cache) if self.config.cache else self.run / "tokens"
        size: int = getattr(self.model.config, "vocab_size")  # noqa: B009
        tokenizer = self.tokenizer
        told = None if self.quiet else tell_tokenising()
        train = load_tokens(texts, tokenizer, cache, vocab_size=size, progress=told)
        if valid is not None:
            held = load_tokens(valid, tokenizer, cache, vocab_size=size)
            if len(held.ids) < 2:
                raise DataError("the validation text has fewer than 2 tokens: give more of it")
            return train, held
        count = max(int(self.config.held_out * len(train.ids)), self.config.context + 1)
        if self.config.held_out == 0 or len(train.ids) - count <= self.config.context:
            return train, None
        return train.split(count, tokenizer)


class _Run:
    """One call of fit: the state of the loop."""

    def __init__(
        self,
        trainer: Trainer,
        windows: Windows,
        held: Tokens | None,
        optimizer: MasterAdamW,
        progress: checkpoint.Progress,
        log: Log,
        view: View,
        device: torch.device,
    ) -> None:
        self.trainer, self.config, self.model = trainer, trainer.config, trainer.model
        self.windows, self.held, self.optimizer = windows, held, optimizer
        self.progress, self.log, self.view, self.device = progress, log, view, device
        # Sums since the last line of the log; they are part of a checkpoint, so that a line that
        # spans an interruption is the same.
        self.sums = dict(progress.sums or {})
        self.timed_tokens, self.timed = 0, 0.0
        self.last: dict[str, Any] = {}

    def go(self, received: list[int], saved: Path | None) -> dict[str, Any]:
        for step in range(self.progress.step, self.config.steps):
            self._step(step)
            done = step + 1
            final = done == self.config.steps
            if final or done % self.config.log_every == 0:
                self._line(done)
            at_checkpoint = final or _due(done, self.config.checkpoint_every)
            valid = None
            if at_checkpoint or _due(done, self.config.validate_every):
                valid = self._validate(done)
            if _due(done, self.config.sample_every) or (final and self.config.sample_every):
                self._sample(done)
            if at_checkpoint or received:
                saved = self._save(done, valid)
            if received and not final and saved is not None:
                raise Interrupted(received[0], done, saved)
        return {**self.last, "step": self.config.steps, "checkpoint": str(saved)}

    def _step(self, step: int) -> None:
        """Forward and backward for every part of the step, then the update."""
        began = time.perf_counter()
        parts = range(step * self.config.accumulate, (step + 1) * self.config.accumulate)
        batches = [self.windows.batch(part, self.config.batch_size) for part in parts]
        nll, norm, tokens = train_step(
            self.model, self.optimizer, self.trainer.objective,
            [batch.to(self.device) for batch in batches], learning_rate(step, self.config),
        )  # fmt: skip
        for name, value in nll.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["tokens"] = self.sums.get("tokens", 0) + tokens
        self.sums["grad_norm"] = norm
        self.timed += time.perf_counter() - began
        self.timed_tokens += tokens
        loss = nll.get("loss", math.nan) / tokens
        self.view.step(step + 1, loss, self._bits(loss), self.timed_tokens / self.timed)

    def _line(self, done: int) -> None:
        """The training line of the log: means over the tokens since the one before."""
        tokens = self.sums.pop("tokens")
        norm = self.sums.pop("grad_norm")
        means = {name: value / tokens for name, value in self.sums.items()}
        seen = done * self.config.batch_size * self.config.accumulate
        self._record(
            {
                "step": done,
                **means,
                "bits_per_byte": self._bits(means["loss"]),
                "lr": learning_rate(done - 1, self.config),
                "grad_norm": norm,
                "epoch": seen / len(self.windows),
                "tokens": seen * self.config.context,
                "seconds": self.timed,
                "tokens_per_second": self.timed_tokens / self.timed,
                "memory_bytes": peak_memory(self.device),
            }
        )
        self.sums, self.timed, self.timed_tokens = {}, 0.0, 0

    def _validate(self, done: int) -> float | None:
        if self.held is None:
            return None
        config = self.config
        score = score_tokens(
            self.model, self.held, context=config.context, batch_size=config.batch_size,
            batches=config.validate_batches, objective=self.trainer.objective,
        )  # fmt: skip
        bits = score.bits_per_byte
        self._record({"step": done, "valid_loss": score.loss, "valid_bits_per_byte": bits})
        return score.loss

    def _sample(self, done: int) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            self.model.eval()
            text = self.trainer.sample(self.model, self.trainer.tokenizer, self.config)
            self.model.train()
        self._record({"step": done, "sample": text})

    def _save(self, done: int, valid: float | None) -> Path:
        self.log.sync()
        self.progress = replace(self.progress, step=done, valid_loss=valid, sums=self.sums)
        trainer = self.trainer
        return checkpoint.save(
            trainer.run, self.model, trainer.tokenizer, self.optimizer, self.progress
        )

    def _record(self, record: dict[str, Any]) -> None:
        self.log.write(record)
        self.view.show(record)
        self.last.update(record)
        for callback in self.trainer.callbacks:
            callback(self.trainer, record)

    def _bits(self, loss: float) -> float:
        """Nats a token as bits a byte, by the bytes a token of the corpus stands for."""
        return loss / math.log(2) / self.windows.tokens.bytes_per_token


def train_step(
    model: nn.Module,
    optimizer: MasterAdamW,
    objective: Objective,
    batches: Sequence[Any],
    lr: float,
) -> tuple[dict[str, float], float, int]:
    """One optimizer step over batches: sums of the loss's parts, the gradient's norm, tokens.

    Every gradient is divided by the tokens of the whole step, so 4 batches of 2 rows make the step
    of one batch of 8. A loss that is not finite raises PolyheadError and changes no weight.
    """
    tokens = sum(batch.tokens() for batch in batches)
    if tokens == 0:
        raise DataError("no label of this step counts: every one is masked")
    sums: dict[str, float] = {}
    for batch in batches:
        loss = objective(model, batch)
        (loss.total / tokens).backward()
        for name, part in (loss.parts or {"loss": loss.total.detach()}).items():
            sums[name] = sums.get(name, 0.0) + float(part)
        total = float(loss.total.detach())
        if not math.isfinite(total):
            optimizer.discard()
            raise PolyheadError(f"the loss is {total}: lower lr, raise warmup, or check the data")
        optimizer.collect()
    return sums, optimizer.step(lr), tokens


def write_sample(model: TaskModel, tokenizer: Any, config: TrainConfig) -> str:
    """`sample_prompt` continued by the model, at temperature 0.8."""
    from polyhead.generate.config import GenerationConfig
    from polyhead.generate.generator import TextGenerator

    settings = GenerationConfig(
        max_new_tokens=config.sample_tokens, temperature=0.8, seed=config.seed
    )
    prompt = config.sample_prompt or "\n"
    return config.sample_prompt + str(TextGenerator(model, tokenizer).generate(prompt, settings))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _signals() -> Generator[list[int]]:
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
