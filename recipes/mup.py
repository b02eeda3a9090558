"""Learning rates that hold at every width: µP (Yang et al. 2021, Tensor Programs V) beside the
standard parametrisation.

Decoders of several widths, all else equal, learn Python's documentation by characters. The
coordinate check: after a few steps with one learning rate, how large attention, feed-forward,
residual stream and logits are at each width. The transfer: which learning rate is best at each. In
µP, relative to a base width of which this one is m times (table 8, AdamW):

    matrices of blocks   drawn with std / sqrt(m), as in the standard; their learning rate / m
    output head          drawn as at the base width, its logits / m; the standard: std / sqrt(m)
    attention            scores by 1/D in the place of 1/sqrt(D), equal at the base width
    embeddings, biases, norms   the same at every width

--stage coordinates or transfer does one of the two; figures.json keeps what the pictures show. The
models are for looking at: a checkpoint of GPT-2 has no place for the scales of logits and scores.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes.common import arguments, tell
from torch import Tensor

import polyhead as ph
from polyhead.cli.corpora import pydocs
from polyhead.models.blocks import blocks_of, in_blocks
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.head import LanguageHead
from polyhead.train.config import TrainConfig
from polyhead.train.data import window_batch
from polyhead.train.objectives import causal_lm
from polyhead.train.optim import Masters
from polyhead.train.step import train_step

KINDS = {"standard": "standard parametrisation", "mup": "µP"}
PLACES = ("attention", "feed-forward", "residual", "logits")
SIZES: dict[str, Any] = dict(num_layers=2, num_heads=4, max_seq_len=64, tie_embeddings=False)
# Neither decay nor clipping, which have scales of their own; gradients of wide models are small.
PLAIN = dict(schedule="constant", weight_decay=0.0, clip=0.0, eps=1e-12, context=64, device="cpu")
BASE = 32

Points = Mapping[int, Mapping[str, Sequence[float]]]
"""By width and place, the mean magnitude after 0, 1, … steps."""


def main() -> None:
    given = arguments(
        __doc__, "mup", stage="both", widths="32,64,128,256,512", seeds=3, check_lr=0.01,
        sweep_widths="32,64,128,256", steps=80, first=-12, last=-4,
    )  # fmt: skip
    pyplot()  # before an hour is spent
    began, out = time.perf_counter(), Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    text = pydocs()
    tokenizer = ph.Tokenizer.train([text], kind="chars")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    figures: dict[str, Any] = {}
    if given.stage != "transfer":
        widths = [int(width) for width in given.widths.split(",")]
        found = {kind: checked(kind, widths, given.seeds, ids, given.check_lr) for kind in KINDS}
        draw_coordinates(found, out / "coordinates.png")
        figures["coordinates"] = found
        figures["slopes"] = {kind: slopes(points) for kind, points in found.items()}
        print(table(figures["slopes"]))
    if given.stage != "coordinates":
        widths = [int(width) for width in given.sweep_widths.split(",")]
        rates = [2.0**power for power in range(given.first, given.last + 1)]
        config = TrainConfig(steps=given.steps, batch_size=8, warmup=10, validate_every=0,
                             validate_batches=0, checkpoint_every=0, cache=str(out / "tokens"),
                             out=str(out / "sweep"), **PLAIN)  # fmt: skip
        losses = {
            kind: {w: swept(kind, w, rates, text, tokenizer, config) for w in widths}
            for kind in KINDS
        }
        draw_transfer(losses, out / "transfer.png")
        figures["losses"] = losses
        figures["best_log2_lr"] = {
            kind: {
                width: math.log2(min(row, key=lambda lr: row[lr])) for width, row in rows.items()
            }
            for kind, rows in losses.items()
        }
    (out / "figures.json").write_text(json.dumps(figures, indent=1))
    shown = ("slopes", "best_log2_lr")
    tell("mup", began, **{name: figures[name] for name in shown if name in figures})


def built(kind: str, width: int, vocab_size: int, seed: int = 0) -> tuple[TaskModel, list[str]]:
    """A decoder of a width, and the `rates` that it is to learn with."""
    model = ph.build(
        "gpt2", seed=seed, vocab_size=vocab_size, d_model=width, init_std=BASE**-0.5, **SIZES
    )
    return model, parametrised(model, width / BASE, kind)


@torch.no_grad()
def parametrised(model: TaskModel, m: float, kind: str) -> list[str]:
    """Scale what a model was drawn with at m times the base width; its `rates`."""
    matrices = in_blocks(model)
    for name in matrices:
        model.get_parameter(name).mul_(m**-0.5)
    head = model.head
    assert isinstance(head, LanguageHead)
    if kind == "standard":
        head.weight.mul_(m**-0.5)
        return []
    head.scale /= m
    for part in model.modules():
        if isinstance(part, MultiHeadAttention):
            part.scale /= m**0.5
    return [f"{name}={1 / m!r}" for name in sorted(matrices)]


def checked(
    kind: str, widths: Sequence[int], seeds: int, ids: Tensor, lr: float, steps: int = 4
) -> dict[int, dict[str, list[float]]]:
    """The coordinates at each width after 0 … `steps` steps on one batch, means over seeds."""
    batch = window_batch(ids.numpy(), np.arange(8) * 977, 64)
    found: dict[int, dict[str, list[float]]] = {}
    for width in widths:
        runs: list[list[dict[str, float]]] = []
        for seed in range(seeds):
            model, rates = built(kind, width, int(ids.max()) + 1, seed)
            config = TrainConfig(rates=tuple(rates), lr=lr, **PLAIN)
            optimizer = Masters(model.train(), config)
            run = [coordinates(model, batch)]
            for _ in range(steps):
                train_step(model, optimizer, causal_lm, [batch], lr)
                run.append(coordinates(model, batch))
            runs.append(run)
        found[width] = {
            place: [statistics.fmean(run[step][place] for run in runs) for step in range(steps + 1)]
            for place in PLACES
        }
        said = {place: round(values[-1], 3) for place, values in found[width].items()}
        print(f"{kind} {width}: {said}", file=sys.stderr)
    return found


@torch.no_grad()
def coordinates(model: TaskModel, batch: Any) -> dict[str, float]:
    """Mean magnitudes of a number in what the last block and the head answer."""
    block = model.get_submodule(blocks_of(model)[-1])
    seen: dict[str, float] = {}
    places = {"attention": block.attention, "feed-forward": block.ffn, "residual": block}
    places["logits"] = model.head

    def note(place: str) -> Any:
        return lambda part, given, answer: seen.update({place: float(answer.abs().mean())})

    hooks = [part.register_forward_hook(note(place)) for place, part in places.items()]
    try:
        model(batch.input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def slopes(points: Points) -> dict[str, float]:
    """By place, how the magnitude after the last step grows with width: its power."""
    widths = [math.log2(width) for width in points]
    return {
        place: statistics.linear_regression(
            widths, [math.log2(points[width][place][-1]) for width in points]
        ).slope
        for place in PLACES
    }


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The slopes, a line a place."""
    head = f"{'power of width':16}" + "".join(f"{kind:>12}" for kind in found)
    rows = (f"{place:16}" + "".join(f"{row[place]:12.2f}" for row in found.values())
            for place in PLACES)  # fmt: skip
    return "\n".join([head, *rows])


def swept(
    kind: str, width: int, rates: Sequence[float], text: str, tokenizer: Any, config: TrainConfig
) -> dict[float, float]:
    """The held-out loss after a run at each learning rate; infinite where a run broke down."""
    losses: dict[float, float] = {}
    for lr in rates:
        model, factors = built(kind, width, tokenizer.vocab_size)
        settings = replace(config, lr=lr, min_lr=None, rates=tuple(factors))
        try:
            trainer = ph.Trainer(model, tokenizer, settings, quiet=True)
            losses[lr] = float(trainer.fit([text], force=True)["valid_loss"])
        except ph.PolyheadError:
            losses[lr] = math.inf
        said = f"{kind} {width}: lr 2^{math.log2(lr):.0f}, loss {losses[lr]:.3f}"
        print(said, file=sys.stderr)
    return losses


def pyplot() -> Any:
    """matplotlib, drawing to files; where it is missing, the recipe says so and stops."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("this recipe draws with matplotlib: pip install polyhead[plots]")
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def draw_coordinates(found: Mapping[str, Points], path: Path) -> None:
    """A row of pictures for each parametrisation, a curve for each step."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.2), sharex=True, sharey="col")
    for row, (kind, points) in zip(axes, found.items(), strict=True):
        for place, axis in zip(PLACES, row, strict=True):
            for step in range(len(next(iter(points.values()))[place])):
                values = [points[width][place][step] for width in points]
                color = plt.get_cmap("viridis")(step / 5)
                axis.plot(list(points), values, "o-", color=color, ms=3, label=f"step {step}")
            axis.set(xscale="log", yscale="log", title=f"{place}, {KINDS[kind]}")
            axis.set_xticks(list(points), [str(width) for width in points])
            axis.minorticks_off()
            axis.title.set_fontsize(9)
    for axis in axes[-1]:
        axis.set_xlabel("width")
    for row in axes:
        row[0].set_ylabel("mean magnitude")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_transfer(found: Mapping[str, Mapping[int, Mapping[float, float]]], path: Path) -> None:
    """Loss by learning rate, a curve for each width, its best marked."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    lowest = min(min(row.values()) for rows in found.values() for row in rows.values())
    for axis, (kind, rows) in zip(axes, found.items(), strict=True):
        for at, (width, row) in enumerate(rows.items()):
            color = plt.get_cmap("viridis")(at / len(rows))
            axis.plot(list(row), list(row.values()), "o-", color=color, ms=3, label=str(width))
            best = min(row, key=lambda lr: row[lr])
            axis.plot(best, row[best], "*", color=color, ms=13)
        axis.set_xscale("log", base=2)
        axis.set(title=KINDS[kind], xlabel="learning rate", ylim=(lowest - 0.05, lowest + 1.5))
    axes[0].set_ylabel("held-out loss, nats a character")
    axes[-1].legend(title="width", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
