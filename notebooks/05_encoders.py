# %% [markdown]
# # BERT, ALBERT and DeBERTa side by side
#
# Three encoders from the same parts. BERT is the plain one; ALBERT runs one layer at every depth and splits
# the embedding in two factors, for a third of the parameters; DeBERTa's scores have terms of their own for
# relative positions. Here all three are built alike, learn the same masked bytes' pieces for the same
# number of steps, and are compared by what each costs and what it reaches.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.cli.corpora import pydocs
from polyhead.explain.similar import layer_similarity

torch.manual_seed(0)
text = pydocs()
cut = int(len(text) * 0.9)
tokenizer = ph.Tokenizer.train([text[:cut]], kind="wordpiece", vocab_size=4000, lowercase=True)
learned, held_out = (
    torch.tensor(tokenizer.encode(part, add_special_tokens=False))
    for part in (text[:cut], text[cut:])
)
print(
    f"{tokenizer.vocab_size} word pieces; {len(learned):,} tokens to learn from, {len(held_out):,} held out"
)

# %% [markdown]
# ## Built alike
#
# The same width, depth and heads. `polyhead diff bert deberta-v3` shows part by part what differs.

# %%
SIZES = dict(
    vocab_size=tokenizer.vocab_size,
    d_model=128,
    d_ff=512,
    num_layers=4,
    num_heads=4,
    max_seq_len=128,
)
OWN = {"bert": {}, "albert": {"embedding_width": 64}, "deberta-v2": {"position_buckets": 32}}
models = {name: ph.build(name, seed=0, **SIZES, **own) for name, own in OWN.items()}
for name, model in models.items():
    inside = sum(p.numel() for part, p in model.backbone.named_parameters() if "layers" in part)
    print(f"{name:<12}{model.num_parameters():>10,} parameters, {inside:>9,} of them in layers")

# %% [markdown]
# ## What each learns in as many steps
#
# A seventh of the tokens is hidden; the loss is on those (Devlin et al. 2019, without the twist of leaving
# some as they are). Learning rate, batch and steps are the same for all.

# %%
STEPS, ROWS, LENGTH = 150, 16, 96


def batch(source: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read `[B, T]`, and what it should say where it is hidden, else -100."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - LENGTH, (ROWS,), generator=generator).tolist()
    rows = torch.stack([source[start : start + LENGTH] for start in starts])
    hidden = torch.rand(rows.shape, generator=generator) < 0.15
    return rows.masked_fill(hidden, tokenizer.mask_id), rows.masked_fill(~hidden, -100)


def loss_of(model: torch.nn.Module, source: torch.Tensor, seed: int) -> torch.Tensor:
    read, wanted = batch(source, seed)
    return F.cross_entropy(model(read).flatten(0, 1), wanted.flatten())


curves, seconds = {}, {}
for name, model in models.items():
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=STEPS, pct_start=0.2
    )
    began, curve = time.perf_counter(), []
    for step in range(STEPS):
        loss = loss_of(model, learned, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    curves[name], seconds[name] = curve, (time.perf_counter() - began) / STEPS
    model.eval()

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, curve in curves.items():
    smooth = torch.tensor(curve).unfold(0, 20, 1).mean(-1)
    axes.plot(range(20, 20 + len(smooth)), smooth, label=name)
axes.set(xlabel="step", ylabel="loss on hidden tokens (mean of 20)")
axes.legend()
plt.show()

# %% [markdown]
# ## Side by side
#
# Forward times are medians of turns in which all three take part, so that the machine's moods fall on each.

# %%
read, _ = batch(held_out, 0)
times: dict[str, list[float]] = {name: [] for name in models}
with torch.no_grad():
    for _ in range(15):
        for name, model in models.items():
            began = time.perf_counter()
            model(read)
            times[name].append(time.perf_counter() - began)
    reached = {
        name: statistics.mean(loss_of(model, held_out, seed).item() for seed in range(1000, 1020))
        for name, model in models.items()
    }
first = statistics.median(times["bert"])
print(f"{'':<12}{'parameters':>12}{'held-out loss':>15}{'ms a step':>11}{'forward / bert':>16}")
for name, model in models.items():
    forward = statistics.median(times[name]) / first
    print(
        f"{name:<12}{model.num_parameters():>12,}{reached[name]:>15.3f}{1000 * seconds[name]:>11.0f}{forward:>16.2f}"
    )

# %% [markdown]
# ALBERT's few parameters save memory and little time: each depth is computed all the same. DeBERTa's own terms
# cost time, and it is first to use where words stand.
#
# ## One layer, four times
#
# ALBERT's depths have one set of weights. Do they do the same? Each depth's states are compared with each
# other's (CKA: 1 is alike up to a turn).

# %%
figure, both = plt.subplots(1, 2, figsize=(7, 3.4), layout="constrained")
for axes, name in zip(both, ("bert", "albert"), strict=True):
    with ph.capture(models[name], what="residual") as states, torch.no_grad():
        models[name](read)
    alike = layer_similarity(states)
    picture = axes.imshow(alike, vmin=0, vmax=1, cmap="Blues")
    axes.set(title=name, xlabel="depth", ylabel="depth", xticks=range(4), yticks=range(4))
    for i in range(4):
        for j in range(4):
            axes.text(
                j,
                i,
                f"{alike[i, j]:.2f}",
                ha="center",
                va="center",
                color="white" if alike[i, j] > 0.6 else "black",
            )
figure.colorbar(picture, ax=both)
plt.show()

# %% [markdown]
# And what ALBERT's depths look at, to walk through; each has its own row of heads.

# %%
ph.inside(
    models["albert"], tokenizer, text[cut : cut + 200].replace("\n", " "), title="a small ALBERT"
)
