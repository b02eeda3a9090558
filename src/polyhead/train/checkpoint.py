"""Checkpoints of a run: whole or not there, verified, and enough to go on bit for bit.

    RUN/checkpoints/step-00000500/   config.json, model.safetensors, tokenizer.json …: a model
                                     directory that `polyhead.load` takes; where an adapter learns,
                                     PEFT's adapter_config.json and adapter_model.safetensors
        trainer/model.safetensors    masters, moments, the rest of the model's state; of a run with
                                     sharded weights a shard-… of each rank in its place
        trainer/random-00000.json    where the random numbers of each rank are, or of each group
        trainer/state.json           step, settings, corpus, sums of the log
        manifest.json                size and SHA-256 of every file
    RUN/checkpoints/latest           the name of the newest

A checkpoint is written into `.tmp-…`, flushed to disk, given its manifest, renamed; only then does
`latest` name it, and only when it has been read back are older ones removed. All ranks take each of
these steps together: where one fails, all raise, and nothing has a name.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyhead.adapt.adapters import adapters_of, in_use
from polyhead.adapt.load import is_adapter
from polyhead.adapt.peft import check_base, save_adapter
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.models.model import TaskModel
from polyhead.models.probes import write_probes
from polyhead.text.directory import state_length
from polyhead.text.tokenizer import Tokenizer
from polyhead.train import random_state
from polyhead.train.config import FREE_ON_RESUME, TrainConfig
from polyhead.train.distributed import Parallel
from polyhead.train.manifest import (
    ALONE,
    FORMAT,
    MANIFEST,
    files_below,
    name_checkpoint,
    sync_files,
    verify,
)
from polyhead.train.optim import Masters, learning_rate
from polyhead.train.pruning import sparsity_at
from polyhead.train.ranks import Ranks
from polyhead.train.shards import on_disk, read_parts, shapes_of, write_parts

__all__ = ["Progress", "best", "best_score", "clean", "latest", "restore", "save", "verify"]

_TRAINER = "trainer"
_NO_PART_OF_THE_MODEL = {"dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what `trainer/state.json` holds."""

    step: int
    config: TrainConfig
    corpus: str
    valid_loss: float | None = None
    score: float | None = None
    sums: Mapping[str, float] | None = None
    passed: int = 0
    """Steps' worth of data that a rewind passed by."""
    guard: Mapping[str, Any] | None = None
    saved_by: tuple[int, ...] | None = None
    """How many ranks wrote it, and how many of them held layers together."""


def save(
    run: Path, model: TaskModel, tokenizer: Any, optimizer: Masters, progress: Progress,
    parallel: Parallel | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of `progress.step`, make it the latest, and prune the others.

    Every rank has to come. Errors: FileError on all of them where one cannot write.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{progress.step:08d}"
    ranks = ALONE if parallel is None else parallel.ranks
    (name, *_) = ranks.together(lambda: f".tmp-{final.name}-{os.getpid()}")
    temp = folder / name
    try:
        ranks.first(lambda: _begin(temp))
        _write(temp, model, tokenizer, optimizer, parallel, ranks)
        ranks.first(lambda: _describe(temp, model, tokenizer, progress, ranks))
        names = sorted(set().union(*ranks.together(lambda: files_below(temp))))
        mine = names[ranks.rank :: ranks.world]
        found = ranks.together(lambda: sync_files(temp, mine))
        files = {name: entry for some in found for name, entry in some.items()}
        ranks.first(lambda: name_checkpoint(temp, final, files))
        ranks.together(lambda: verify(final, ranks))
        ranks.first(lambda: _prune(folder, progress.config.keep))
    except OSError as error:
        raise FileError(
            f"{final}: cannot be written ({error}); check space and permissions"
        ) from None
    finally:
        if ranks.is_first:
            shutil.rmtree(temp, ignore_errors=True)
    return final


def _begin(temp: Path) -> None:
    """An empty directory to write into."""
    shutil.rmtree(temp, ignore_errors=True)
    temp.parent.mkdir(exist_ok=True)  # a run that was removed is not made again
    temp.mkdir()
    (temp / _TRAINER).mkdir()


def _write(
    temp: Path,
    model: TaskModel,
    tokenizer: Any,
    optimizer: Masters,
    parallel: Parallel | None,
    ranks: Ranks,
) -> None:
    """The model, what the optimizer knows, and the random numbers."""
    trainer, tensors = temp / _TRAINER, _tensors(model, optimizer)
    ranks.together(lambda: random_state.keep(trainer, ranks))
    in_parts = parallel is not None and parallel.is_sharded
    if in_parts:
        ranks.together(lambda: write_parts(trainer, tensors))
        if not in_use(model):
            ranks.first(lambda: _join(temp, model, optimizer, tensors))
            return
    with optimizer.averaged(), nullcontext() if parallel is None else parallel.whole():
        ranks.first(lambda: _save_model(temp, model))
        if parallel is None and isinstance(tokenizer, Tokenizer):
            write_probes(model, tokenizer, temp, hashed=False)
    if not in_parts:  # after the model, which may write down what follows from other weights
        ranks.first(lambda: write_checkpoint(trainer, tensors))


def _join(temp: Path, model: TaskModel, optimizer: Masters, tensors: Mapping[str, Tensor]) -> None:
    """Make the model's own files of the parts that all ranks have written.

    The first rank reads those, and nothing is gathered: what a model weighs stands in a file of its
    own for that long, and in no rank's memory. It is made at every checkpoint, as any may turn out
    to be the best, or the last.
    """
    sources = _sources(model, optimizer)
    with on_disk(temp / ".whole", {name: tensors[name] for name in sources.values()}) as whole:
        read_parts(temp / _TRAINER, whole, alone=True)
        model.save(temp, force=True, state={name: whole[own] for name, own in sources.items()})


def _save_model(folder: Path, model: TaskModel) -> None:
    """The model; where an adapter learns, that alone and what the model with it is."""
    names = in_use(model)
    if not names:
        model.save(folder, force=True)
        return
    for name in names:
        save_adapter(model, folder, name)
    said = json.dumps(model.hf_config(), indent=2, sort_keys=True)
    (folder / "config.json").write_text(f"{said}\n", encoding="utf-8")


def _describe(
    temp: Path, model: TaskModel, tokenizer: Any, progress: Progress, ranks: Ranks
) -> None:
    """Tokenizer and state."""
    tokenizer.save(temp)
    state_length(temp, model.config.max_tokens)
    state = {
        "format": FORMAT,
        "step": progress.step,
        "config": progress.config.to_dict(),
        "corpus": progress.corpus,
        "valid_loss": progress.valid_loss,
        "score": progress.score,
        "sums": dict(progress.sums or {}),
        "passed": progress.passed,
        "guard": progress.guard,
        "ranks": [ranks.world, ranks.tensor],
    }
    (temp / _TRAINER / "state.json").write_text(json.dumps(state))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None where there is none."""
    folder = run / "checkpoints"
    with contextlib.suppress(OSError):
        named = folder / Path((folder / "latest").read_text().strip()).name
        if (named / MANIFEST).exists():
            return named
    found = _all(folder)
    return found[-1] if found else None


def best(run: Path) -> Path | None:
    """The kept checkpoint of highest score or else of lowest validation loss, None where none was
    validated."""
    ranks = {path: _rank(path) for path in _all(run / "checkpoints")}
    known = {path: rank for path, rank in ranks.items() if rank is not None}
    return max(known, key=lambda path: known[path]) if known else None


def best_score(run: Path) -> float | None:
    """The highest score of the kept checkpoints, None where none has one."""
    scores = [_validated(path).get("score") for path in _all(run / "checkpoints")]
    return max((score for score in scores if score is not None), default=None)


def clean(run: Path) -> None:
    """Remove what a killed writer left."""
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def restore(
    checkpoint: Path,
    model: TaskModel,
    optimizer: Masters,
    config: TrainConfig,
    corpus: str,
    parallel: Parallel | None = None,
) -> Progress:
    """Verify, check that it belongs to this model, settings and corpus, and take it all up.

    Every rank has to come; there may be more of them or fewer than saved it.
    """
    ranks = ALONE if parallel is None else parallel.ranks
    ranks.together(lambda: verify(checkpoint, ranks))
    trainer = checkpoint / _TRAINER
    state = json.loads((trainer / "state.json").read_text())
    if state["format"] < FORMAT:
        raise ConfigError(
            f"{checkpoint} was saved by an earlier polyhead (format {state['format']}), whose runs "
            "this one cannot go on with; start a new run from it, as its model"
        )
    _check_model_config(checkpoint, model)
    with nullcontext() if parallel is None else parallel.whole():
        _check_base(checkpoint, model)
    shapes = shapes_of(trainer)
    _check_model(checkpoint, shapes, optimizer)
    old = TrainConfig.from_dict(state["config"], str(checkpoint))
    _check_config(checkpoint, old, config, state["step"])
    if state["corpus"] != corpus:
        raise ConfigError(
            f"{checkpoint} was trained on another corpus or tokenizer, or with other options of "
            "its objective: give it what it had (run.json), unchanged, or start a new run"
        )
    own = model.state_dict()
    kept = [name for name in shapes if name.startswith("model.")]
    rest = {name: own[name.removeprefix("model.")].detach() for name in kept}
    into = {**optimizer.blank(shapes), **rest}
    ranks.together(lambda: read_parts(trainer, into))
    optimizer.load(into)
    random_state.take_up(trainer, ranks, config.seed, state["step"])
    return Progress(
        state["step"], old, corpus, state["valid_loss"], state.get("score"), state["sums"],
        state.get("passed", 0), state.get("guard"), tuple(state["ranks"]),
    )  # fmt: skip


def _tensors(model: TaskModel, optimizer: Masters) -> dict[str, Tensor]:
    """Everything a run needs to go on, as this rank has it."""
    state = optimizer.state()
    # What stands still beside an adapter is its base, which is elsewhere.
    own = {} if in_use(model) else model.state_dict()
    for name, source in _sources(model, optimizer).items() if own else ():
        if source not in state:
            state[source] = own[name]
    return state


def _sources(model: TaskModel, optimizer: Masters) -> dict[str, str]:
    """Where a checkpoint keeps each tensor of a model: with those that learn, or beside them.

    Names that are tied lead to the same.
    """
    learns = {
        id(param): name for name, param in zip(optimizer.names, optimizer.params, strict=True)
    }
    params = dict(model.named_parameters(remove_duplicate=False))
    kind = "average" if optimizer.averages else "master"
    found: dict[str, str] = {}
    for name in model.state_dict():
        owner = learns.get(id(params.get(name)))
        found[name] = f"model.{name}" if owner is None else f"{kind}.{owner}"
    return found


def _check_model_config(checkpoint: Path, model: TaskModel) -> None:
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    own = json.loads(json.dumps(model.hf_config()))
    for name in sorted({*saved, *own} - _NO_PART_OF_THE_MODEL):
        theirs, ours = saved.get(name), own.get(name)
        if theirs != ours:
            raise ConfigError(
                f"{checkpoint} holds another model: {name} is {json.dumps(theirs)} there and "
                f"{json.dumps(ours)} here; build the model it was trained with"
            )


def _check_model(checkpoint: Path, saved: Mapping[str, Sequence[int]], optimizer: Masters) -> None:
    masters = zip(optimizer.names, optimizer.masters, strict=True)
    own = {f"master.{name}": list(master.shape) for name, master in masters}
    for name in sorted({*(name for name in saved if name.startswith("master.")), *own}):
        theirs = list(saved[name]) if name in saved else "nothing"
        ours = own.get(name, "nothing")
        if theirs != ours:
            raise ConfigError(
                f"{checkpoint} holds another model: {name.removeprefix('master.')} is {theirs} "
                f"there and {ours} here; build the model it was trained with"
            )


def _check_base(checkpoint: Path, model: TaskModel) -> None:
    adapted = is_adapter(checkpoint)
    if adapted != bool(in_use(model)):
        there, here = ("an adapter", "none") if adapted else ("no adapter", "one")
        raise ConfigError(
            f"{checkpoint} holds {there}, and the model has {here}: give it as it was"
        )
    for name in in_use(model):
        check_base(model, checkpoint, adapters_of(model)[name].trained)


def _check_config(checkpoint: Path, old: TrainConfig, new: TrainConfig, step: int) -> None:
    was, now = old.to_dict(), new.to_dict()
    for name in was:
        if name not in FREE_ON_RESUME and was[name] != now[name]:
            raise ConfigError(
                f"{checkpoint} was trained with {name} = {was[name]}, not {now[name]}: "
                "resume with its settings (config.toml), of which steps, device, parallel and what "
                "is looked at and kept may change, or start a new run"
            )
    if step > new.steps:
        raise ConfigError(f"{checkpoint} has {step} steps behind it, more than {new.steps} in all")
    if any(learning_rate(i, old) != learning_rate(i, new) for i in range(step)):
        raise ConfigError(
            f"{checkpoint}: with steps = {new.steps} instead of {old.steps} its first {step} steps "
            "would have had other learning rates: use schedule constant or wsd for open ends"
        )
    if any(sparsity_at(i, old) != sparsity_at(i, new) for i in range(step)):
        raise ConfigError(
            f"{checkpoint}: with steps = {new.steps} instead of {old.steps} its first {step} steps "
            "would have been pruned otherwise: leave steps as they were"
        )


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def _rank(checkpoint: Path) -> tuple[bool, float] | None:
    """What is better is larger: any score before all losses."""
    found = _validated(checkpoint)
    score, loss = found.get("score"), found.get("valid_loss")
    if score is not None:
        return True, score
    return None if loss is None else (False, -loss)


def _validated(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / _TRAINER / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest and the best."""
    kept = {*_all(folder)[-keep:], best(folder.parent)}
    for path in _all(folder):
        if path not in kept:
            # Renamed first, so that a kill half-way leaves no broken checkpoint behind.
            gone = path.with_name(f".tmp-{path.name}-{os.getpid()}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
