"""One call of `Trainer.fit`, step by step: the log, validations, samples and checkpoints of it."""

import math
import time
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import torch

from polyhead.errors import PolyheadError
from polyhead.train import checkpoint
from polyhead.train.data import Dataset, Windows
from polyhead.train.distributed import Parallel
from polyhead.train.evaluate import score_dataset, score_tokens
from polyhead.train.guards import Guard
from polyhead.train.log import Log, View, peak_memory
from polyhead.train.optim import Masters, NotFiniteError, learning_rate
from polyhead.train.order import part_seed
from polyhead.train.pruning import Pruner
from polyhead.train.step import Interrupted, train_step

if TYPE_CHECKING:
    from polyhead.train.loop import Trainer


class Running:
    """What a run holds from step to step."""

    def __init__(
        self,
        trainer: "Trainer",
        dataset: Dataset,
        held: Dataset | None,
        optimizer: Masters,
        parallel: Parallel,
        progress: checkpoint.Progress,
        log: Log | None,
        view: View,
        device: torch.device,
    ) -> None:
        self.trainer, self.config, self.model = trainer, trainer.config, trainer.model
        self.dataset, self.held, self.optimizer = dataset, held, optimizer
        self.parallel, self.ranks = parallel, parallel.ranks
        self.progress, self.log, self.view, self.device = progress, log, view, device
        # Sums since the last line of the log; they are part of a checkpoint, so that a line that
        # spans an interruption is the same.
        self.sums = dict(progress.sums or {})
        self.guard = Guard(trainer.config, progress.guard)
        self.pruner = Pruner(self.model, self.config)
        self.timed_rows, self.timed = 0, 0.0
        self.last: dict[str, Any] = {}

    def go(self, received: list[int], saved: Path | None) -> dict[str, Any]:
        """Steps until the last one, or until a signal is received; the last figures."""
        step = self.progress.step
        while step < self.config.steps:
            loss = self._step(step)
            if loss is not None and self.guard.is_spike(loss):
                if saved is not None:
                    step = self._rewind(step, loss, saved)
                    continue
                self._record({"step": step + 1, "spike": loss})
            step += 1
            final = step == self.config.steps
            if final or step % self.config.log_every == 0:
                self._line(step)
            at_checkpoint = final or _due(step, self.config.checkpoint_every)
            valid, score = self._look(step, final, at_checkpoint)
            if not self.pruner.is_done(step):  # better for weights that are still to go
                valid = score = None
            # One rank decides: another may look when the checkpoint is already there.
            is_best = self.ranks.is_first and self._is_best(score)
            stopped, better = self.ranks.sum([len(received), is_best])
            if at_checkpoint or stopped or better:
                saved = self._save(step, valid, score)
            if stopped and not final and saved is not None:
                raise Interrupted(received[0] if received else SIGTERM, step, saved)
        self.optimizer.exchange()  # what the run leaves is what it saved
        if self.parallel.is_sharded:
            self.parallel.end()
        found = {**self.last, "step": self.config.steps, "checkpoint": str(saved)}
        if self.trainer.kind.metric is not None:
            found["best"] = str(checkpoint.best(self.trainer.run) or saved)
        return found

    def _look(
        self, step: int, final: bool, at_checkpoint: bool
    ) -> tuple[float | None, float | None]:
        """Validate and sample where that is due; what `_validate` says."""
        validates = at_checkpoint or _due(step, self.config.validate_every)
        samples = _due(step, self.config.sample_every) or (final and self.config.sample_every > 0)
        valid = score = None
        if validates or samples:  # whole and averaged weights are dear: for no other step
            with self.optimizer.averaged(), self.parallel.whole():
                if validates:
                    valid, score = self._validate(step)
                if samples:
                    self._sample(step)
        return valid, score

    def _step(self, step: int) -> float | None:
        """Forward and backward for every part of the step, then the update; the mean loss, None
        where it was left out."""
        began = time.perf_counter()
        self.pruner.before(step, self.optimizer)
        first = (step + self.progress.passed) * self.config.accumulate
        parts = self.ranks.share(range(first, first + self.config.accumulate))
        batches = [self.dataset.batch(part, self.config.batch_size) for part in parts]
        try:
            nll, norm, counted = train_step(
                self.model, self.optimizer, self.parallel,
                [batch.to(self.device) for batch in batches], learning_rate(step, self.config),
                self.guard.limit, self.ranks,
                [part_seed(self.config.seed, part) for part in parts],
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.optimizer.discard()
            raise PolyheadError(self._smaller(step)) from None
        except NotFiniteError as error:
            self._record({"step": step + 1, "skipped": str(error)})
            self._require_finite(f"step {step + 1}: {error}")
            self.guard.skip(step + 1, str(error))
            return None
        for name, value in nll.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.sums["tokens"] = self.sums.get("tokens", 0) + counted
        self.sums["grad_norm"] = norm
        if self.config.zclip:
            self.sums["clipped"] = self.sums.get("clipped", 0) + self.guard.clipped
        self.timed += time.perf_counter() - began
        self.timed_rows += self.config.batch_size * self.config.accumulate
        loss = nll.get("loss", math.nan) / counted
        self.view.step(step + 1, loss, self._bits(loss), self._speed())
        return loss

    def _require_finite(self, what: str) -> None:
        """PolyheadError, which begins with `what`, where a weight or a moment is no number."""
        name = self.optimizer.not_finite()
        (broken,) = self.ranks.sum([name is not None])
        if broken:
            raise PolyheadError(
                f"{what}: {name or 'what another process holds'} is no longer finite, and no step "
                "mends that: resume from the last checkpoint, with a lower lr where it comes back"
            )

    def _smaller(self, step: int) -> str:
        """What to do where a step does not fit into memory: the largest batches that do, found by
        its own rows."""
        rows, count = self.config.batch_size, self.config.accumulate
        said = f"batch_size = {rows} does not fit into memory"
        # Of the sizes that make the same step.
        for size in (n for n in range(rows - 1, 0, -1) if rows * count % n == 0):
            parts = rows * count // size
            first = (step + self.progress.passed) * parts
            try:
                for part in range(first, first + parts):
                    batch = self.dataset.batch(part, size).to(self.device)
                    self.trainer.objective(self.model, batch).total.backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.optimizer.discard()
                continue
            self.optimizer.discard()
            also = f"batch_size = {size} and accumulate = {parts}"
            return f"{said}; {also} make the same step, and fit"
        return f"{said}, and no smaller one does: lower context, or set recompute = blocks"

    def _rewind(self, step: int, loss: float, saved: Path) -> int:
        """Go back to the last checkpoint, and on with the data after this step's; where that is."""
        self.guard.rewind(step + 1, loss)
        rewinds = self.guard.rewinds
        found = checkpoint.restore(
            saved, self.model, self.optimizer, self.config, self.progress.corpus, self.parallel
        )
        passed = self.progress.passed + step + 1 - found.step
        self.progress = replace(found, config=self.config, passed=passed)
        self.sums, self.timed, self.timed_rows = dict(found.sums or {}), 0.0, 0
        self.guard = Guard(self.config, found.guard)
        self.guard.rewinds = rewinds
        self._record({"step": step + 1, "rewound_to": found.step, "spike": loss})
        return found.step

    def _line(self, done: int) -> None:
        """The training line of the log: means over what counted since the one before."""
        if "tokens" not in self.sums:  # every step since was left out
            return
        counted = self.sums.pop("tokens")
        norm, clipped = self.sums.pop("grad_norm"), self.sums.pop("clipped", None)
        means = {name: value / counted for name, value in self.sums.items()}
        seen = done * self.config.batch_size * self.config.accumulate
        bits = self._bits(means["loss"])
        unit, a_row = self._unit()
        pruned = self.pruner.found(self.optimizer)
        self._record(
            {
                "step": done,
                **means,
                **({} if bits is None else {"bits_per_byte": bits}),
                "lr": learning_rate(done - 1, self.config),
                "grad_norm": norm,
                **({} if clipped is None else {"clipped": clipped}),
                **({} if pruned is None else {"sparsity": pruned.share}),
                "epoch": seen / len(self.dataset),
                unit: seen * a_row,
                "seconds": self.timed,
                f"{unit}_per_second": self._speed(),
                "memory_bytes": peak_memory(self.device),
            }
        )
        self.sums, self.timed, self.timed_rows = {}, 0.0, 0

    def _validate(self, done: int) -> tuple[float | None, float | None]:
        """The held-out loss, and the figure that the best checkpoint is chosen by, if any."""
        if self.held is None:
            return None, None
        config, kind = self.config, self.trainer.kind
        sizes = {"batch_size": config.batch_size, "batches": config.validate_batches}
        if isinstance(self.held, Windows):
            score = score_tokens(
                self.model, self.held.tokens, context=self.held.context,
                objective=self.trainer.objective, **sizes,
            )  # fmt: skip
            bits = score.bits_per_byte
            self._record({"step": done, "valid_loss": score.loss, "valid_bits_per_byte": bits})
            return score.loss, None
        found = score_dataset(self.model, self.held, self.trainer.objective, kind.metric, **sizes)
        self._record({"step": done, **{f"valid_{name}": value for name, value in found.items()}})
        loss, *figures = found.values()
        return loss, (figures[0] if figures else None)

    def _is_best(self, score: float | None) -> bool:
        """Whether this is better than all kept so far; without a score nothing is."""
        if score is None:
            return False
        before = checkpoint.best_score(self.trainer.run)
        return before is None or score > before

    def _sample(self, done: int) -> None:
        assert self.trainer.sample is not None
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            self.model.eval()
            text = self.trainer.sample(self.model, self.trainer.tokenizer, self.config)
            self.model.train()
        self._record({"step": done, "sample": text})

    def _save(self, done: int, valid: float | None, score: float | None) -> Path:
        self._require_finite(f"step {done} is not saved")
        if self.log is not None:
            self.log.sync()
        self.progress = replace(
            self.progress, step=done, valid_loss=valid, score=score, sums=self.sums,
            guard=self.guard.state(),
        )  # fmt: skip
        trainer = self.trainer
        return checkpoint.save(
            trainer.run, self.model, trainer.tokenizer, self.optimizer, self.progress,
            self.parallel,
        )  # fmt: skip

    def _record(self, record: dict[str, Any]) -> None:
        self.last.update(record)
        if self.log is None:  # another rank tells
            return
        self.log.write(record)
        self.view.show(record)
        for callback in self.trainer.callbacks:
            callback(self.trainer, record)

    def _unit(self) -> tuple[str, int]:
        """What is counted, and how many a row has."""
        return (
            ("tokens", self.dataset.context) if isinstance(self.dataset, Windows) else ("rows", 1)
        )

    def _speed(self) -> float:
        return self.timed_rows * self._unit()[1] / self.timed

    def _bits(self, loss: float) -> float | None:
        """Nats a token as bits a byte, by the bytes a token of the corpus stands for."""
        if not isinstance(self.dataset, Windows):
            return None
        return loss / math.log(2) / self.dataset.tokens.bytes_per_token


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    is_one = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_one or any(said in str(error) for said in ("out of memory", "can't allocate memory"))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
