"""SmolLM2-135M made smaller, each time mended by as many tokens: what that costs and saves.

Half of the weights zero, two of every four, a third of the heads gone; a model left whole learns
from the same tokens, so that what pruning costs is told from what the texts teach. All are scored
before and after on verses held out of what is learned, and on Python's documentation, which none
reads. Speed is of the packed model in bfloat16, by rounds in which each has its turn; --speeds 1
measures those alone, of the models that a run has left, so that nothing else need run beside it.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipes.common import arguments, pairs, tell

import polyhead as ph
from polyhead.cli.corpora import pydocs
from polyhead.compress.quantize import weight_bytes
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

BASE = "smollm2-135m"
CONTEXT, BATCH = 256, 2
HELD, SCORED = slice(20_000, 20_600), 6_000  # verses; characters of each text that are scored
PROMPT, WRITTEN, ROUNDS = 512, 32, 9
GRADUAL: dict[str, Any] = {"prune_begin": 0.1, "prune_end": 0.5, "prune_every": 1}


@dataclass(frozen=True)
class Way:
    """How a model becomes smaller at once, and how it learns.

    gradual: settings that bring it there while it learns, from the whole model on; where there are
    none, what was made at once goes on learning. end: what it is after that.
    """

    make: Callable[[TaskModel], TaskModel]
    gradual: Mapping[str, Any] = field(default_factory=dict[str, Any])
    end: Callable[[TaskModel], TaskModel] = lambda model: model


def ways(rows: torch.Tensor) -> dict[str, Way]:
    """What is compared, by the names that --only takes. rows: ids `[n, T]` that say what counts."""

    def counts(model: TaskModel) -> Any:
        return ph.importance(model, rows)

    return {
        "whole": Way(lambda model: model),
        "half": Way(lambda model: ph.prune(model, 0.5), {"prune": 0.5, **GRADUAL}),
        "heads": Way(lambda model: ph.shrink(model, heads=0.3, importance=counts(model))),
        "2:4": Way(
            lambda model: ph.prune(model, by="2:4"), {"prune": 0.5, "prune_by": "2:4", **GRADUAL}
        ),
        "neurons": Way(lambda model: ph.shrink(model, neurons=0.3, importance=counts(model))),
        "low-rank": Way(
            lambda model: ph.low_rank(model, keep=0.7, moments=ph.second_moments(model, rows))
        ),
        "int4": Way(
            lambda model: ph.quantize(model, "int4"),
            {"qat": "int4"},
            lambda model: ph.quantize(model, "int4"),
        ),
    }


def main() -> None:
    given = arguments(__doc__, "shrink", steps=48, lr=1e-4, only="whole,half,heads,2:4", speeds=0)
    out, began = Path(given.out), time.perf_counter()
    if given.speeds:
        _tell_speeds(out, given.only.split(","), began)
    else:
        _mend(given, out, began)


def _mend(given: argparse.Namespace, out: Path, began: float) -> None:
    """Each way at once and mended, on the disk what comes of it."""
    model, words = ph.load(BASE, dtype=torch.float32), ph.tokenizer(BASE)
    train, scored = _texts()
    rows = words.encode(train[: 20 * CONTEXT])[: 4 * CONTEXT]
    ways_by_name = ways(torch.tensor(rows).view(-1, CONTEXT))
    for name in given.only.split(","):
        way = ways_by_name[name]
        small = way.make(copy.deepcopy(model))
        tell(f"shrink: {name}, at once", began, **_perplexities(small, words, scored))
        config = ph.TrainConfig(
            steps=given.steps, batch_size=BATCH, context=CONTEXT, lr=given.lr,
            warmup=given.steps // 6, weight_decay=0.0, dtype="bfloat16", held_out=0.0,
            validate_every=0, checkpoint_every=0, out=str(out / name.replace(":", "-")),
            cache=str(out / "tokens"), **way.gradual,
        )  # fmt: skip
        start = copy.deepcopy(model) if way.gradual else small
        found = ph.Trainer(start, words, config).fit([train], force=given.force)
        mended = way.end(ph.load(found["checkpoint"], dtype=torch.float32))
        figures = {**_perplexities(mended, words, scored), **_size(mended)}
        mended.to(torch.bfloat16).save(_left(out, name), force=True)
        figures["bytes_on_disk"] = sum(
            os.path.getsize(file) for file in _left(out, name).glob("*.safetensors")
        )
        tell(f"shrink: {name}, mended by {given.steps * BATCH * CONTEXT} tokens", began, **figures)


def _texts() -> tuple[str, dict[str, str]]:
    """What is learned from, without any verse of what is held out; what is scored."""
    verses = [row[0] for row in pairs("bible.en-es.tsv")]
    held = verses[HELD]
    seen = set(held)
    train = " ".join(verse for verse in verses if verse not in seen)
    return train, {"bible": " ".join(held)[:SCORED], "python": pydocs()[:SCORED]}


def _perplexities(model: TaskModel, words: Tokenizer, texts: dict[str, str]) -> dict[str, float]:
    model = ph.pack(model)
    return {
        f"perplexity_{name}": ph.perplexity(
            model, words, text, context=512, stride=511, batch_size=1
        ).perplexity
        for name, text in texts.items()
    }


def _size(model: TaskModel) -> dict[str, int]:
    """Of the model in bfloat16, as it is saved and computes."""
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
    count = model.num_parameters()
    made = copy.deepcopy(model).to(torch.bfloat16)
    return {"parameters": count, "not_zero": count - zeros, "bytes": weight_bytes(made)}


def _left(out: Path, name: str) -> Path:
    return out / "made" / name.replace(":", "-")


def _tell_speeds(out: Path, names: list[str], began: float) -> None:
    """Tokens a second of one text: read, and written after it; medians, and ratios by round."""
    engines = {name: _engine(ph.pack(ph.load(_left(out, name)))) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name in names if turn % 2 else names[::-1]:
            seconds[name].append(_seconds(engines[name], turn))
    first = seconds[names[0]][1:]
    for name in names:
        own = seconds[name][1:]
        read, wrote = (statistics.median(each) for each in zip(*own, strict=True))
        beside = [
            statistics.median(a[kind] / b[kind] for a, b in zip(first, own, strict=True))
            for kind in (0, 1)
        ]
        tell(
            f"shrink, speed: {name}", began, read_per_second=PROMPT / read,
            written_per_second=(WRITTEN - 1) / wrote, read_beside=beside[0],
            written_beside=beside[1], beside=names[0],
        )  # fmt: skip


def _engine(model: TaskModel) -> ph.Engine:
    length = PROMPT + WRITTEN
    return ph.Engine(
        model, None, ph.EngineConfig(max_rows=1, cache_tokens=length + 64, max_len=length)
    )


def _seconds(engine: ph.Engine, turn: int) -> tuple[float, float]:
    """Until the first token of a text that is new, and from there to the last."""
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=WRITTEN, ignore_eos=True)
    marks = [time.perf_counter()]
    request = engine.add([(37 * i + turn) % 40000 + 100 for i in range(PROMPT)], config)
    while not (request.texts and request.texts[0].written):
        engine.step()
    marks.append(time.perf_counter())
    engine.run()
    marks.append(time.perf_counter())
    return marks[1] - marks[0], marks[2] - marks[1]


if __name__ == "__main__":
    main()
