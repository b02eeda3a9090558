"""One small GPT made smaller in every way, each mended by as many steps: what it costs and saves.

A decoder that reads characters learns Python's documentation (as `make demo`), and is then pruned,
shrunk, factored or rounded; a copy that is left whole learns for as long. Held-out text is scored
before and after the mending; speed is that of a forward over 8 texts of 128 characters, the median
of rounds in which each model has its turn.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipes.common import arguments, tell

import polyhead as ph
from polyhead.cli.demo import split
from polyhead.compress.quantize import weight_bytes
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

CONTEXT, BATCH = 128, 8
SIZES: dict[str, Any] = dict(
    d_model=128, num_layers=4, num_heads=10, head_dim=16, d_ff=352, init_std=0.06
)
ROUNDS = 15


@dataclass(frozen=True)
class Way:
    """How a model becomes smaller, with which settings it then learns, and what it ends as."""

    make: Callable[[TaskModel], TaskModel]
    settings: dict[str, Any]
    end: Callable[[TaskModel], TaskModel] = lambda model: model


def ways(rows: torch.Tensor) -> dict[str, Way]:
    """What is compared. rows: token ids `[n, T]` that say what counts."""

    def heads(by_texts: bool) -> Callable[[TaskModel], TaskModel]:
        return lambda model: ph.shrink(
            model, heads=0.3, importance=ph.importance(model, rows) if by_texts else None
        )

    at_once = {"prune_begin": 0.0, "prune_end": 0.0}
    return {
        "whole": Way(lambda model: model, {}),
        "half of the weights zero": Way(lambda m: ph.prune(m, 0.5), {"prune": 0.5, **at_once}),
        "2 of every 4 zero": Way(
            lambda m: ph.prune(m, by="2:4"), {"prune": 0.5, "prune_by": "2:4", **at_once}
        ),
        "3 of 10 heads gone, by weights": Way(heads(by_texts=False), {}),
        "3 of 10 heads gone, by texts": Way(heads(by_texts=True), {}),
        "half of the neurons gone, by texts": Way(
            lambda m: ph.shrink(m, neurons=0.5, importance=ph.importance(m, rows)), {}
        ),
        "low rank, half of the weights": Way(
            lambda m: ph.low_rank(m, keep=0.5, moments=ph.second_moments(m, rows)), {}
        ),
        "int4": Way(lambda m: m, {}, lambda m: ph.quantize(m, "int4")),
        "int4, by qat": Way(lambda m: m, {"qat": "int4"}, lambda m: ph.quantize(m, "int4")),
    }


def main() -> None:
    given = arguments(__doc__, "shrink", steps=2000, mend=400, lr=3e-3)
    corpus = split()
    words = Tokenizer.train([corpus.train], kind="chars")
    base = Path(given.out) / "base"

    def learn(model: TaskModel, out: Path, steps: int, lr: float, **settings: Any) -> TaskModel:
        config = ph.TrainConfig(
            steps=steps, batch_size=BATCH, context=CONTEXT, lr=lr, warmup=steps // 20,
            validate_every=0, checkpoint_every=0, out=str(out), cache=f"{given.out}/tokens",
            **settings,
        )  # fmt: skip
        found = ph.Trainer(model, words, config).fit([corpus.train], force=given.force)
        return ph.load(found["checkpoint"])

    began = time.perf_counter()
    model = ph.build("llama", seed=0, vocab_size=words.vocab_size, max_seq_len=CONTEXT, **SIZES)
    model = learn(model, base, given.steps, given.lr)
    ids = torch.tensor(words.encode(corpus.train[: 64 * CONTEXT])[: 60 * CONTEXT])
    made: dict[str, TaskModel] = {}
    figures: dict[str, dict[str, Any]] = {}
    for number, (name, way) in enumerate(ways(ids.view(-1, CONTEXT)).items()):
        small = way.make(model)
        before = _perplexity(way.end(small), words, corpus.held_out)
        out = Path(given.out) / f"way-{number}"
        made[name] = way.end(learn(small, out, given.mend, given.lr / 3, **way.settings))
        after = _perplexity(made[name], words, corpus.held_out)
        figures[name] = {"perplexity_before": before, "perplexity": after, **_size(made[name])}
    for name, speed in _speeds(made).items():
        tell(f"shrink: {name}", began, **figures[name], tokens_per_second=speed)


def _perplexity(model: TaskModel, words: Tokenizer, text: str) -> float:
    return ph.perplexity(model.eval(), words, text).perplexity


def _size(model: TaskModel) -> dict[str, int]:
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
    count = model.num_parameters()
    return {"parameters": count, "not_zero": count - zeros, "bytes": weight_bytes(model)}


def _speeds(models: dict[str, TaskModel]) -> dict[str, float]:
    """Tokens a second by model."""
    ids = torch.randint(0, 50, (BATCH, CONTEXT))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):  # the first warms up
            for name, model in models.items():
                began = time.perf_counter()
                model(ids)
                seconds[name].append(time.perf_counter() - began)
    return {name: ids.numel() / statistics.median(taken[1:]) for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
