# %% [markdown]
# # Making a model smaller, and what it cost
#
# SmolLM2-135M, made smaller in each way there is: fewer bits, zeros, fewer heads and neurons, products of
# thin matrices. Each is weighed, asked (perplexity on text that nothing here learns from) and timed. Then one
# that suffered learns again, and we see how much comes back. `make recipe NAME=shrink` does the same for
# longer; `polyhead compress` does it to a model on disk.

# %%
# %matplotlib inline
import copy
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch

import polyhead as ph
from polyhead.cli.corpora import pydocs
from polyhead.compress.quantize import weight_bytes
from polyhead.models.model import TaskModel

torch.manual_seed(0)
model, tokenizer = ph.load("smollm2-135m", dtype=torch.float32), ph.tokenizer("smollm2-135m")
text = pydocs()
scored = text[:4_000]
learned = text[40_000:]
read = torch.tensor(tokenizer.encode(learned[:10_000]))[:1024].view(
    4, 256
)  # what ways that ask texts are shown
blocks = sum(weight.numel() for weight in model.backbone.layers.parameters())
print(
    f"{model.num_parameters() / 1e6:.0f} M weights, {blocks / model.num_parameters():.0%} of them in blocks; "
    f"{len(tokenizer.encode(scored)):,} tokens are scored"
)

# %% [markdown]
# ## Every way, at once
#
# Nothing learns here. The weights come from a file of four bits with a scale for each 32 (Q4_1): `int4` finds
# that very grid again and loses nothing *here*, which says nothing of a model that was never rounded; with a
# scale for each 64 it is off the grid. `docs/compression.md` has the methods that read texts to round better.


# %%
def halves(small: TaskModel) -> TaskModel:
    return small.to(torch.bfloat16)


ways: dict[str, Callable[[], TaskModel]] = {
    "whole": lambda: halves(copy.deepcopy(model)),
    "int8": lambda: ph.quantize(model, "int8"),
    "int4": lambda: ph.quantize(model, "int4"),
    "int4, 64 a scale": lambda: ph.quantize(model, "int4", group=64),
    "30 % zero": lambda: halves(ph.prune(model, 0.3)),
    "50 % zero": lambda: halves(ph.prune(model, 0.5)),
    "2 of 4 zero": lambda: halves(ph.prune(model, by="2:4")),
    "3 of 9 heads": lambda: halves(ph.shrink(model, heads=0.3, importance=counts())),
    "25 % of neurons": lambda: halves(ph.shrink(model, neurons=0.25, importance=counts())),
    "thin matrices": lambda: halves(
        ph.low_rank(model, keep=0.8, moments=ph.second_moments(model, read))
    ),
}


def counts() -> Any:
    """How much each head and neuron counts for the loss on two texts."""
    return ph.importance(model, read[:2])


def figures(small: TaskModel) -> dict[str, float]:
    """Bytes in memory, perplexity, and tokens a second read and written, as it computes best here."""
    found = {"MB": weight_bytes(small) / 1e6}
    small = ph.pack(small)
    said = ph.perplexity(small, tokenizer, scored, context=512, stride=511, batch_size=1)
    found["perplexity"] = said.perplexity
    writer = ph.TextGenerator(small, tokenizer)
    prompt = read[0].tolist()
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        writer.generate([prompt], ph.GenerationConfig(max_new_tokens=1, temperature=0))
        first = time.perf_counter()
        writer.generate(
            [prompt[:16]], ph.GenerationConfig(max_new_tokens=25, min_new_tokens=25, temperature=0)
        )
        done = time.perf_counter()
    return found | {"read/s": len(prompt) / (first - began), "written/s": 25 / (done - first)}


figures(ways["whole"]())  # what comes first pays for what a process makes once
table = {}
print(f"{'':<17}{'MB':>6}{'perplexity':>12}{'read/s':>8}{'written/s':>11}{'made in':>9}")
for name, make in ways.items():
    began = time.perf_counter()
    small = make()
    seconds = time.perf_counter() - began
    table[name] = figures(small)
    mb, perplexity, reads, writes = table[name].values()
    print(f"{name:<17}{mb:>6.0f}{perplexity:>12.2f}{reads:>8.0f}{writes:>11.0f}{seconds:>7.1f} s")

# %% [markdown]
# Bits are the cheapest to give away: eight cost next to nothing and double the speed of writing, which is
# reading weights from memory. Zeros save no byte and no time, as nothing here multiplies by fewer; thin
# matrices save bytes, but each product becomes two that wait for each other. What goes whole, neurons and
# heads, saves what it took and no more. Perplexity against bytes, in one picture:

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
for name, row in table.items():
    marker = "o" if name.startswith("int") else "s" if "zero" in name else "^"
    axes.scatter(row["MB"], row["perplexity"], marker=marker)
    left = name in (
        "whole",
        "30 % zero",
        "50 % zero",
        "2 of 4 zero",
        "3 of 9 heads",
        "25 % of neurons",
    )
    axes.annotate(
        name,
        (row["MB"], row["perplexity"]),
        xytext=(-6 if left else 6, 3),
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=9,
    )
axes.set(yscale="log", xlabel="MB in memory", ylabel="perplexity (log)", xlim=(60, 290))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Learning again
#
# The model that lost a quarter of its neurons learns for a few steps, with the whole model as its teacher
# (Hinton et al. 2015): from what it says of every next token, not only from the one that came.


# %%
def taught(student: TaskModel, out: str) -> TaskModel:
    config = ph.TrainConfig(
        steps=16,
        batch_size=2,
        context=256,
        lr=1e-4,
        warmup=4,
        weight_decay=0.0,
        dtype="bfloat16",
        held_out=0.0,
        validate_every=0,
        checkpoint_every=0,
        out=out,
    )
    trainer = ph.Trainer(student, tokenizer, config, teacher=model)
    found = trainer.fit([learned], force=True)
    return ph.load(found["checkpoint"], dtype=torch.bfloat16)


began = time.perf_counter()
smaller = ph.shrink(model, neurons=0.25, importance=counts())
mended = figures(taught(smaller, "runs/mended"))["perplexity"]
seconds = time.perf_counter() - began
print(
    f"whole {table['whole']['perplexity']:.2f}; without a quarter of the neurons "
    f"{table['25 % of neurons']['perplexity']:.2f}, after {16 * 512:,} tokens {mended:.2f} ({seconds:.0f} s)"
)
