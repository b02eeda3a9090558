"""Checkpoints of a run: whole or not there, verified, and enough to go on bit for bit.

    RUN/checkpoints/step-00000500/   config.json, model.safetensors, tokenizer.json …: a model
                                     directory that `polyhead.load` takes; where an adapter learns,
                                     PEFT's adapter_config.json and adapter_model.safetensors
        trainer/model.safetensors    masters, moments, the rest of the model's state, RNG states
        trainer/state.json           step, settings, corpus, sums of the log
        manifest.json                size and SHA-256 of every file
    RUN/checkpoints/latest           the name of the newest

A checkpoint is written into `.tmp-…`, flushed to disk, given its manifest, renamed; only then does
`latest` name it, and only when it has been read back are older ones removed.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyhead.adapt.adapters import adapters_of, in_use
from polyhead.adapt.load import is_adapter
from polyhead.adapt.peft import check_base, save_adapter
from polyhead.errors import ConfigError, FileError
from polyhead.files.disk import atomic_file, sync_directory
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.models.model import TaskModel
from polyhead.text.directory import state_length
from polyhead.train.config import FREE_ON_RESUME, TrainConfig
from polyhead.train.distributed import Parallel, Ranks, gathered, local, shard_like
from polyhead.train.optim import Masters, learning_rate
from polyhead.train.pruning import sparsity_at

_TRAINER, _MANIFEST, _FORMAT = "trainer", "manifest.json", 1
_NO_PART_OF_THE_MODEL = {"dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what `trainer/state.json` holds, but for the RNG states."""

    step: int
    config: TrainConfig
    corpus: str
    valid_loss: float | None = None
    score: float | None = None
    sums: Mapping[str, float] | None = None
    passed: int = 0
    """Steps' worth of data that a rewind passed by."""
    guard: Mapping[str, Any] | None = None


def save(
    run: Path, model: TaskModel, tokenizer: Any, optimizer: Masters, progress: Progress,
    parallel: Parallel | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of `progress.step`, make it the latest, and prune the others.

    Every rank has to come; the first writes whole tensors, so that any number of them can go on.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{progress.step:08d}"
    temp = folder / f".tmp-{final.name}-{os.getpid()}"
    ranks = Ranks() if parallel is None else parallel.ranks
    tensors = _tensors(model, optimizer)
    try:
        with optimizer.averaged():
            shards = parallel is not None and parallel.is_sharded and not in_use(model)
            state = {n: gathered(t) for n, t in model.state_dict().items()} if shards else None
            with nullcontext() if parallel is None else parallel.whole():
                if ranks.is_first:
                    shutil.rmtree(temp, ignore_errors=True)
                    folder.mkdir(exist_ok=True)  # a run that was removed is not made again
                    temp.mkdir()
                    _save_model(temp, model, state)
        if ranks.is_first:
            tokenizer.save(temp)
            state_length(temp, model.config.max_tokens)
            write_checkpoint(temp / _TRAINER, tensors)
            (temp / _TRAINER / "state.json").write_text(json.dumps(_state(progress)))
            _name(temp, final)
    except OSError as error:
        raise FileError(
            f"{final}: cannot be written ({error}); check space and permissions"
        ) from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    if ranks.is_first:
        verify(final)
        _prune(folder, progress.config.keep)
    ranks.wait()
    return final


def _name(temp: Path, final: Path) -> None:
    """Give what is written its name, and `latest` that of it, each durable before the next."""
    _sync_files(temp)
    manifest = json.dumps({"format": _FORMAT, "files": _hashes(temp)}, indent=1)
    with atomic_file(temp / _MANIFEST) as file:
        file.write(manifest.encode())
    if final.exists():  # an undone write after `latest` was turned back, or a rerun
        shutil.rmtree(final)
    temp.rename(final)
    sync_directory(final.parent)
    with atomic_file(final.parent / "latest") as file:
        file.write(final.name.encode())


def _save_model(folder: Path, model: TaskModel, state: Mapping[str, Tensor] | None) -> None:
    """The model; where an adapter learns, that alone and what the model with it is."""
    names = in_use(model)
    if not names:
        model.save(folder, force=True, **({} if state is None else {"state": state}))
        return
    for name in names:
        save_adapter(model, folder, name)
    said = json.dumps(model.hf_config(), indent=2, sort_keys=True)
    (folder / "config.json").write_text(f"{said}\n", encoding="utf-8")


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, None where there is none."""
    folder = run / "checkpoints"
    with contextlib.suppress(OSError):
        named = folder / Path((folder / "latest").read_text().strip()).name
        if (named / _MANIFEST).exists():
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


def verify(checkpoint: Path) -> None:
    """FileError unless every file is as the manifest says."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        version, files = int(manifest["format"]), dict(manifest["files"])
        found = _hashes(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{checkpoint}: no checkpoint (its manifest cannot be read)") from None
    if version > _FORMAT:
        raise FileError(
            f"{checkpoint}: has format {version}, and this polyhead reads up to {_FORMAT}: use the "
            "one that wrote it, or a newer one"
        )
    for name, entry in files.items():
        if found.get(name) != entry:
            fault = "was altered" if name in found else "is missing"
            raise FileError(f"{checkpoint}: {name} {fault}: remove this checkpoint, use an older")


def restore(
    checkpoint: Path,
    model: TaskModel,
    optimizer: Masters,
    config: TrainConfig,
    corpus: str,
) -> Progress:
    """Verify, check that it belongs to this model, settings and corpus, and take it all up."""
    verify(checkpoint)
    state = json.loads((checkpoint / _TRAINER / "state.json").read_text())
    tensors = open_checkpoint(checkpoint / _TRAINER)
    _check_model_config(checkpoint, model)
    _check_base(checkpoint, model)
    _check_model(checkpoint, tensors, _tensors(model, optimizer, moments=False))
    old = TrainConfig.from_dict(state["config"], str(checkpoint))
    _check_config(checkpoint, old, config, state["step"])
    if state["corpus"] != corpus:
        raise ConfigError(
            f"{checkpoint} was trained on another corpus or tokenizer, or with other options of "
            "its objective: give it what it had (run.json), unchanged, or start a new run"
        )
    optimizer.load(tensors)
    rest = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    with torch.no_grad():
        own = model.state_dict()
        for name, value in rest.items():
            own[name].copy_(shard_like(value, own[name]))
    _set_rng(state["rng"], tensors)
    score = state.get("score")
    return Progress(
        state["step"], old, corpus, state["valid_loss"], score, state["sums"],
        state.get("passed", 0), state.get("guard"),
    )  # fmt: skip


def _tensors(model: TaskModel, optimizer: Masters, *, moments: bool = True) -> dict[str, Tensor]:
    """Everything a run needs to go on; without moments, what tells one model from another."""
    state = optimizer.state()
    if not moments:
        return {name: tensor for name, tensor in state.items() if name.startswith("master.")}
    # Tied names of a trained tensor lead to the same memory: the master covers them all. What
    # stands still beside an adapter is its base, which is elsewhere.
    trained = {local(p).data_ptr() for p in optimizer.params}
    for name, tensor in ({} if in_use(model) else model.state_dict()).items():
        if local(tensor).data_ptr() not in trained:
            state[f"model.{name}"] = gathered(tensor)
    state["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, rng in enumerate(torch.cuda.get_rng_state_all()):
            state[f"rng.cuda.{index}"] = rng
    return state


def _state(progress: Progress) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "format": _FORMAT,
        "step": progress.step,
        "config": progress.config.to_dict(),
        "corpus": progress.corpus,
        "valid_loss": progress.valid_loss,
        "score": progress.score,
        "sums": dict(progress.sums or {}),
        "passed": progress.passed,
        "guard": progress.guard,
        "rng": {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]},
    }


def _set_rng(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(tensors["rng.torch"].clone())
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"].clone(), index)


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


def _check_model(checkpoint: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    names = sorted(name for name in saved if name.startswith("master."))
    for name in sorted({*names, *own}):
        theirs = list(saved[name].shape) if name in saved else "nothing"
        ours = list(own[name].shape) if name in own else "nothing"
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


def _sync_files(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_directory(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below `folder` but the manifest."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": digest,
        }
    return entries


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_MANIFEST}"))


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
