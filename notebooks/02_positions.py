# %% [markdown]
# # Positions, compared by extrapolation
#
# Attention alone knows no order: positions say what stands where. Seven ways to say it, in one decoder
# that is otherwise the same, each trained on texts of 64 bytes and then given texts of 512. What differs
# is how far a model can read beyond what it was taught.

# %%
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.cli.corpora import pydocs

torch.manual_seed(0)
TAUGHT, READ = 64, 512
STEPS, ROWS = 400, 24
text = torch.tensor(list(pydocs().encode()))
held_out, learned = text[-60_000:], text[:-60_000]
print(f"{len(learned):,} bytes to learn from, {len(held_out):,} held out")

# %% [markdown]
# | kind | what it does | |
# |---|---|---|
# | none | nothing; a causal decoder can still count what it sees | Haviv et al. 2022 |
# | learned | a vector for each position, added to the token; there is none beyond the last | Devlin et al. 2019 |
# | sinusoidal | fixed waves, added to the token | Vaswani et al. 2017 |
# | rotary | turns queries and keys by their positions, so that scores depend on the distance | Su et al. 2021 |
# | alibi | takes from each score in proportion to the distance | Press et al. 2022 |
# | t5 | adds to each score a learned number for the distance's bucket | Raffel et al. 2020 |
# | shaw | adds learned vectors for the distance, clipped, to keys and values | Shaw et al. 2018 |
#
# All are one argument of `ph.build("transformer", position=...)`: attention itself does not change.

# %%
KINDS = ("none", "learned", "sinusoidal", "rotary", "alibi", "t5", "shaw")


def made(kind: str) -> torch.nn.Module:
    longest = TAUGHT if kind == "learned" else READ
    sizes = dict(d_model=64, d_ff=256, num_layers=2, num_heads=4, max_seq_len=longest)
    return ph.build(
        "transformer",
        kind="decoder",
        position=kind,
        vocab_size=256,
        norm_first=True,
        seed=0,
        **sizes,
    )


def windows(source: torch.Tensor, length: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - length - 1, (rows,), generator=generator)
    return torch.stack([source[start : start + length + 1] for start in starts.tolist()])


def losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """In bits a byte, `[rows, T]`."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none") / 0.6931


def taught(kind: str) -> torch.nn.Module:
    model = made(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for step in range(STEPS):
        loss = losses(model, windows(learned, TAUGHT, ROWS, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


began = time.perf_counter()
models = {kind: taught(kind) for kind in KINDS}
print(f"{len(KINDS)} models in {time.perf_counter() - began:.0f} s")

# %% [markdown]
# Now each reads texts eight times as long. What stands late in a long text should be *easier*: more has
# been read. Where the loss rises instead, positions have left what was taught.

# %%
rows = windows(held_out, READ, 96, seed=1)
found = {}
with torch.no_grad():
    for kind, model in models.items():
        reach = TAUGHT if kind == "learned" else READ
        found[kind] = losses(model, rows[:, : reach + 1]).mean(0)

print(f"{'bits a byte at':<16}{'33-64':>8}{'65-128':>8}{'129-256':>8}{'257-512':>8}")
for kind, curve in found.items():
    ranges = [curve[32:64], curve[64:128], curve[128:256], curve[256:]]
    told = [f"{part.mean():8.2f}" if len(part) else f"{'-':>8}" for part in ranges]
    print(f"{kind:<16}{''.join(told)}")

# %%
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for kind, curve in found.items():
    smooth = curve.unfold(0, 32, 1).mean(-1)
    axes.plot(range(16, 16 + len(smooth)), smooth, label=kind, linewidth=1.6)
axes.axvline(TAUGHT, color="grey", linestyle=":", label="as far as was taught")
axes.set(xlabel="position in the text", ylabel="bits a byte (mean of 32)", xscale="log")
axes.set_xticks([16, 32, 64, 128, 256, 512], [16, 32, 64, 128, 256, 512])
axes.legend(ncols=2)
plt.show()

# %% [markdown]
# The learned table simply ends: a longer text is refused, with what to do.

# %%
try:
    models["learned"](rows[:, :READ])
except ValueError as error:
    print(error)

# %% [markdown]
# What differs is nothing but scores: ALiBi's only grow less with distance, and so a far key is never
# stranger than a near one was. Rotary turns by angles never seen, and waves add vectors never seen.

# %%
with ph.capture(models["alibi"], "layers.1") as near, torch.no_grad():
    models["alibi"](rows[:1, :READ])
with ph.capture(models["sinusoidal"], "layers.1") as far, torch.no_grad():
    models["sinusoidal"](rows[:1, :READ])
figure, both = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axes, seen, name in zip(both, (near, far), ("alibi", "sinusoidal"), strict=True):
    (weights,) = seen.values()
    axes.imshow(weights[0].mean(0)[::4, ::4] ** 0.4, cmap="Blues")
    axes.set(
        title=f"{name}: every fourth token, mean of heads", xlabel="is looked at", ylabel="looks"
    )
plt.show()
