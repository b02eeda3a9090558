"""The training loop: every family, every objective."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from polyhead.adapt.adapters import in_use
from polyhead.adapt.base import base_digest
from polyhead.compress.layers import check_floats
from polyhead.compress.qat import rounded
from polyhead.errors import ConfigError
from polyhead.kernels.training import fused
from polyhead.models.model import TaskModel, require_causal
from polyhead.train import adversarial, checkpoint, random_state, registry, rundir
from polyhead.train.allocator import keep_freed_memory
from polyhead.train.blend import open_corpora
from polyhead.train.compiled import compiling
from polyhead.train.config import TrainConfig
from polyhead.train.data import Dataset, Examples
from polyhead.train.distill import distilled
from polyhead.train.distributed import Parallel
from polyhead.train.evaluate import score_dataset, score_texts
from polyhead.train.log import Log, View, tell_tokenising
from polyhead.train.multitask import opened
from polyhead.train.objectives import Objective
from polyhead.train.optim import Masters, cast
from polyhead.train.preference import Compared
from polyhead.train.pruning import check_pruning
from polyhead.train.ranks import Ranks, joined
from polyhead.train.recompute import recomputing
from polyhead.train.records import ExampleColumns, Rows, Table, read_table
from polyhead.train.registry import ObjectiveKind
from polyhead.train.running import Running
from polyhead.train.sources import Source
from polyhead.train.step import Interrupted, signals, train_step, write_sample
from polyhead.train.teacher import SELF, as_found, check_self_teacher, check_teacher, keep, taken_up

__all__ = ["Interrupted", "Trainer", "train_step", "write_sample"]

Callback = Callable[["Trainer", dict[str, Any]], None]
"""Called with the trainer and each record of the log as it is written."""
Sample = Callable[[TaskModel, Any, TrainConfig], str]
"""Text by the model in its present state; random numbers it draws do not disturb the training."""


class Trainer:
    """Trains `model` in place. With dtype bfloat16 the model's own weights become bfloat16.
    Where an adapter is in use it alone learns, and checkpoints hold it without its base.

    tokenizer: for images, their processor. config: None is TrainConfig(), and for tables
    TrainConfig.fine_tuning(). objective: a name of `registry.OBJECTIVES`, a row like those, or a
    function `(model, batch) -> Loss` over windows of text. columns: where a table has what the
    objective reads, as ExampleColumns or {role: column}. options: the objective's own settings.
    sift: above 0, adversarial training beside the objective, with that weight (5 as published).
    teacher: a model to answer like, or "self", which is the model as the run found it;
    distillation: the settings of `distilled` (weight, temperature, hidden, correlation).
    sample: writes a text every `sample_every` steps; the default continues `sample_prompt`.
    callbacks: see `Callback`. about: what run.json is to say of a run that begins. quiet: no view.
    """

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Any,
        config: TrainConfig | None = None,
        *,
        objective: str | ObjectiveKind | Objective = "causal-lm",
        columns: ExampleColumns | Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        sift: float = 0.0,
        teacher: TaskModel | Literal["self"] | None = None,
        distillation: Mapping[str, float] | None = None,
        sample: Sample | None = None,
        callbacks: Sequence[Callback] = (),
        about: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.kind = _kind(objective)
        self.config = config or (TrainConfig.fine_tuning() if self.kind.columns else TrainConfig())
        self.columns = (
            columns if isinstance(columns, ExampleColumns) else ExampleColumns(dict(columns or {}))
        )
        self.options = registry.settled(self.kind, options or {})
        self.objective: Objective = partial(self.kind.loss, **self.options.loss)
        self.sift = sift
        if sift:
            adversarial.embedding_norm(model)
            self.objective = adversarial.sift(self.objective, weight=sift)
        self.alone, self.teacher = self.objective, teacher
        self.distillation: dict[str, Any] = dict(distillation or {})
        if teacher == SELF:
            check_self_teacher(model)
        elif teacher is not None:
            check_teacher(model, teacher)
            self.objective = distilled(self.alone, teacher, **self.distillation)
        self.sample, self.callbacks, self.about, self.quiet = sample, callbacks, about, quiet
        self.run = Path(self.config.out)
        self._check_model()
        if self.kind.prepare is not None:
            self.model = self.kind.prepare(model)

    def fit(
        self,
        texts: Source | Rows,
        valid: Source | Rows | None = None,
        *,
        resume: bool = False,
        force: bool = False,
    ) -> dict[str, Any]:
        """Train for `config.steps` steps or `config.epochs`; the last figures, and `checkpoint`,
        where the last one is. Where the objective has a metric, `best` is where its best one is.

        texts, valid: strings in a list or any iterable, a dataset, the path of a text, a table, a
        folder of these or a directory of `polyhead prepare`, or several as `Corpus` by name; for an
        objective that has columns, a table (.tsv, .csv, .jsonl, .parquet) or rows as dicts. Without
        `valid`, `held_out` of it is for validation.
        resume: go on from the run's newest checkpoint, or begin if there is none.
        force: begin anew where a run already is; that goes once the new one is ready to start.
        Raises Interrupted on SIGINT and SIGTERM; PolyheadError when the loss is no longer finite.
        """
        ranks, name = joined(self.config.device, self.config.tensor)
        ranks.share(range(self.config.accumulate))
        ranks.first(lambda: rundir.claim(self.run, resume=resume, force=force))
        device = self._device(name)
        if device.type == "cpu":
            keep_freed_memory()
        train, held = ranks.in_turn(lambda: self._datasets(texts, valid))
        self._count_epochs(len(train))
        last = checkpoint.latest(self.run) if resume else None
        itself = self._follow_itself(last) if self.teacher == SELF else None
        random_state.seed(self.config.seed, ranks)
        parallel = Parallel(self.model, self.objective, self.config, ranks, device)
        optimizer = Masters(self.model, self.config)
        parallel.connect()
        digest = self._seal(train.digest)
        progress = checkpoint.Progress(0, self.config, digest)
        if last is not None:
            found = checkpoint.restore(last, self.model, optimizer, self.config, digest, parallel)
            progress = replace(found, config=self.config)
        log = ranks.first(lambda: self._begin(progress.step, resume))
        if itself is not None:
            if last is None:
                ranks.first(lambda: keep(itself, self.run))
            cast(itself, getattr(torch, self.config.dtype))
        for split, dataset in (("train", train), ("valid", held)):
            if isinstance(dataset, Compared):
                with parallel.whole():
                    dataset.refer(self.model, self.run, split, ranks, anew=last is None)
        view = View(self.config.steps, progress.step, quiet=self.quiet or not ranks.is_first)
        if progress.saved_by not in (None, (ranks.world, ranks.tensor)):
            view.say(_other_ranks(progress, ranks))
        self.model.train()
        try:
            faster = self._faster(ranks, device)
            again = recomputing(self.model, self.config.recompute)
            qat = self.config.qat
            bits = nullcontext() if qat == "none" else rounded(self.model, qat)
            with faster, bits, again, view, signals() as received:
                run = Running(self, train, held, optimizer, parallel, progress, log, view, device)
                return run.go(received, last)
        finally:
            if log is not None:
                log.close()
            self.model.eval()

    def _faster(self, ranks: Ranks, device: torch.device) -> AbstractContextManager[None]:
        """Blocks by the compiler where that is asked for, parts by kernels of our own elsewhere;
        those know of no rank's heads."""
        if self.config.compile:
            return compiling(self.model, device)
        return fused(self.model) if ranks.tensor == 1 else nullcontext()

    def _seal(self, digest: str) -> str:
        """What a checkpoint knows its data and its objective by."""
        found = registry.sealed(self.kind, self.options, digest)
        found += f" sift {self.sift}" if self.sift else ""
        if self.teacher is None:
            return found
        named = self.teacher if isinstance(self.teacher, str) else base_digest(self.teacher)
        return f"{found} teacher " + str({**self.distillation, "teacher": named})

    def _follow_itself(self, last: Path | None) -> TaskModel:
        """Set the objective to learn from the model as the run began, which this gives."""
        found = as_found(self.model) if last is None else taken_up(self.model, self.run)
        self.objective = distilled(self.alone, found, **self.distillation)
        return found

    def _begin(self, step: int, resume: bool) -> Log:
        rundir.begin(self.run, {**self._spec(), **(self.about or {})}, anew=not resume)
        checkpoint.clean(self.run)
        self.config.save(self.run / "config.toml")
        return Log(self.run / "log.jsonl", step=step)

    def evaluate(
        self, texts: Source | Rows, *, context: int | None = None, stride: int | None = None
    ) -> dict[str, float]:
        """The figures of texts or a path: loss (nats a token), perplexity, bits_per_byte, tokens,
        bytes; for other objectives than causal-lm, `loss` and the metric's.

        Every token is scored once, in sliding windows of `context` (the run's own unless given)
        that advance by `stride` (half of it unless given).
        """
        self.model.to(self._device(self.config.device))
        size = self.config.context if context is None else context
        batch = self.config.batch_size
        if self.kind.name != "causal-lm":
            config = replace(self.config, context=size)
            dataset = self._dataset(self._source(texts), config, "all")
            assert dataset is not None
            return score_dataset(self.model, dataset, self.objective, self.kind.metric, batch)
        score = score_texts(
            self.model, self.tokenizer, self._source(texts),
            context=size, stride=stride, batch_size=batch,
        )  # fmt: skip
        return score.to_dict()

    def _check_model(self) -> None:
        kind, config = self.kind, self.config
        check_pruning(self.model, config)
        if config.qat != "none":
            check_floats(self.model, "rounded")
        if len(names := in_use(self.model)) > 1:
            raise ConfigError(
                f"adapters {', '.join(names)} are in use: use_adapters(model, NAME) says which of "
                "them is to learn"
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError(
                "no weight of the model learns: use an adapter of it, or model.requires_grad_(True)"
            )
        if kind.name == "causal-lm":
            require_causal(self.model)
            limit = self.model.config.max_tokens
            if limit is not None and config.context > limit:
                raise ConfigError(
                    f"context is {config.context}, and the model takes {limit} tokens: "
                    "set context to that or less"
                )
            self.sample = self.sample or write_sample
        else:
            registry.check_model(kind, self.model)
        if config.sample_every and self.sample is None:
            raise ConfigError(
                f"sample_every is {config.sample_every}, and {kind.name} writes no texts: set it "
                "to 0"
            )

    def _spec(self) -> dict[str, Any]:
        """What run.json says of the objective, where it is another than the usual."""
        if self.kind.name == "causal-lm" and not self.options.given:
            return {}
        spec: dict[str, Any] = {"objective": self.kind.name, "options": self.options.given}
        if self.sift:
            spec["sift"] = self.sift
        if self.kind.columns:
            spec["roles"] = dict(self.columns.roles)
            spec["columns"] = list(self.columns.names)
        return spec

    def _device(self, name: str | None) -> torch.device:
        name = name or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError):
            raise ConfigError(f"device is {name!r}: there is no such device here") from None

    def _datasets(
        self, texts: Source | Rows, valid: Source | Rows | None
    ) -> tuple[Dataset, Dataset | None]:
        """What to learn from, and what to validate on (None where there is too little)."""
        config, source = self.config, self._source(texts)
        if self.kind.decide is not None:
            self.kind.decide(self.model, self.tokenizer, source)
        if valid is not None:
            config = replace(config, held_out=0.0)
            held_source = self._source(valid)
            train = self._dataset(source, config, "train")
            held = self._dataset(held_source, config, "all")
        else:
            train = self._dataset(source, config, "train")
            held = self._dataset(source, config, "valid") if config.held_out else None
        assert train is not None
        if isinstance(train, Examples):
            train = replace(train, step=config.batch_size * config.accumulate)
        return train, held

    def _source(self, source: Source | Rows) -> Any:
        """Texts as they are; the table of an objective that reads one."""
        given: Any = source
        if self.kind.name == "multitask":
            return opened(given, registry.TASKS)
        if not self.kind.columns:
            return open_corpora(given, self.columns)
        is_read = isinstance(given, Table)
        return given if is_read else read_table(given, self.kind.columns, self.columns)

    def _dataset(self, source: Any, config: TrainConfig, split: str) -> Dataset | None:
        more = dict(self.options.dataset)
        if "progress" in inspect.signature(self.kind.dataset).parameters and not self.quiet:
            more["progress"] = tell_tokenising()
        return self.kind.dataset(source, self.tokenizer, self.model, config, split, **more)

    def _count_epochs(self, rows: int) -> None:
        """Epochs as steps: the run's settings name these alone, so that `steps` can extend it."""
        if self.config.epochs is not None:
            a_step = self.config.batch_size * self.config.accumulate
            steps = max(1, math.ceil(self.config.epochs * rows / a_step))
            self.config = replace(self.config, steps=steps, epochs=None)


def _other_ranks(progress: checkpoint.Progress, ranks: Ranks) -> str:
    """What is to be said of a run that goes on with other processes."""
    there, here = (
        f"{world} process{'es' * (world > 1)}" + (f" in groups of {tensor}" if tensor > 1 else "")
        for world, tensor in (progress.saved_by or (1, 1), (ranks.world, ranks.tensor))
    )
    return f"saved by {there}, goes on with {here}: the steps are the same"


def _kind(objective: str | ObjectiveKind | Objective) -> ObjectiveKind:
    if isinstance(objective, str):
        return registry.objective_named(objective)
    if isinstance(objective, ObjectiveKind):
        return objective
    return replace(registry.OBJECTIVES["causal-lm"], loss=objective)
