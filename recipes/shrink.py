"""One small GPT made smaller in every way, each mended by as many steps: what it costs and saves.

A decoder that reads characters learns the standard library's sources, and copies of it are pruned,
shrunk, factored or rounded; one that is left whole learns for as long. Held-out files are scored
before and after the mending. Speed is that of a forward over 256 tokens in the shapes of
SmolLM2-135M, eight of its layers, the median of rounds in which each model has its turn.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipes.common import arguments, tell
from recipes.sources import corpus

import polyhead as ph
from polyhead.compress.quantize import weight_bytes
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

CONTEXT, BATCH = 128, 8
SIZES: dict[str, Any] = dict(
    d_model=128, num_layers=4, num_heads=10, head_dim=16, d_ff=352, init_std=0.06
)
SMOL: dict[str, Any] = dict(
    vocab_size=49152, d_model=576, d_ff=1536, num_layers=8, num_heads=9, num_kv_heads=3,
    tie_embeddings=True,
)  # fmt: skip
SOME, HELD = 8, 60_000  # one file in so many is read; so many characters of the others are scored
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
    train, others = corpus()
    train, held = train[::SOME], "\n".join(others[::SOME])[:HELD]
    words = Tokenizer.train([*train, held], kind="chars")
    base = Path(given.out) / "base"

    def learn(model: TaskModel, out: Path, steps: int, lr: float, **settings: Any) -> TaskModel:
        config = ph.TrainConfig(
            steps=steps, batch_size=BATCH, context=CONTEXT, lr=lr, warmup=steps // 20,
            validate_every=0, checkpoint_every=0, out=str(out), cache=f"{given.out}/tokens",
            **settings,
        )  # fmt: skip
        found = ph.Trainer(model, words, config).fit(train, force=given.force)
        return ph.load(found["checkpoint"])

    began = time.perf_counter()
    model = ph.build("llama", seed=0, vocab_size=words.vocab_size, max_seq_len=CONTEXT, **SIZES)
    model = learn(model, base, given.steps, given.lr)
    ids = torch.tensor(words.encode("\n".join(train[::50]))[: 60 * CONTEXT])
    for number, (name, way) in enumerate(ways(ids.view(-1, CONTEXT)).items()):
        small = way.make(copy.deepcopy(model))
        before = _perplexity(way.end(small), words, held)
        out = Path(given.out) / f"way-{number}"
        mended = way.end(learn(small, out, given.mend, given.lr / 3, **way.settings))
        after = _perplexity(mended, words, held)
        figures = {"perplexity_before": before, "perplexity": after, **_size(mended)}
        tell(f"shrink: {name}", began, **figures)
    for name, speed in _speeds().items():
        tell(f"shrink, speed: {name}", began, tokens_per_second=speed)


def _perplexity(model: TaskModel, words: Tokenizer, text: str) -> float:
    return ph.perplexity(model.eval(), words, text).perplexity


def _size(model: TaskModel) -> dict[str, int]:
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
    count = model.num_parameters()
    return {"parameters": count, "not_zero": count - zeros, "bytes": weight_bytes(model)}


def _speeds() -> dict[str, float]:
    """Tokens a second by what is gone; weights by chance, which speed does not depend on."""
    whole = ph.build("llama", seed=0, **SMOL).eval()
    models = {
        "whole": whole,
        "half of the weights zero": ph.prune(whole, 0.5),
        "a third of the heads gone": ph.shrink(whole, heads=0.33),
        "a third of the heads of keys gone": ph.shrink(whole, kv_heads=0.33),
        "half of the neurons gone": ph.shrink(whole, neurons=0.5),
        "low rank, half of the weights": ph.low_rank(whole, keep=0.5),
    }
    ids = torch.randint(0, SMOL["vocab_size"], (1, 256))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):  # the first warms up
            for name, model in models.items():
                began = time.perf_counter()
                model.hidden(ids)
                seconds[name].append(time.perf_counter() - began)
    return {name: ids.numel() / statistics.median(taken[1:]) for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
