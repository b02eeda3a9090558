# %% [markdown]
# # Experts
#
# A mixture of experts has several feed-forward layers and a router that sends each token to a few of them:
# more weights for the same arithmetic. Here a dense model and two mixtures of equal arithmetic read prose
# and code; then we look at who is sent where, and what happens without an expert.

# %%
import random
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.cli.corpora import pydocs, stdlib
from polyhead.explain.experts import expert_load
from polyhead.explain.replace import steered
from polyhead.nn.moe import load_balance_loss, routing

torch.manual_seed(0)
prose, code = pydocs()[:400_000], "\n".join(random.Random(0).sample(stdlib(), 60))[:400_000]
tokenizer = ph.Tokenizer.train([prose, code], kind="bpe", vocab_size=512)
texts = {
    name: torch.tensor(tokenizer.encode(text)) for name, text in (("prose", prose), ("code", code))
}
learned = {name: ids[: -len(ids) // 10] for name, ids in texts.items()}
held_out = {name: ids[-len(ids) // 10 :] for name, ids in texts.items()}
print({name: f"{len(ids):,} tokens" for name, ids in texts.items()})

# %% [markdown]
# ## Three of equal arithmetic
#
# Two of eight experts, each of half the dense model's inner width, are as many products a token as the
# dense feed-forward. Of the two mixtures one learns with the balance loss (Fedus et al. 2021), which asks
# that tokens spread, and one without.

# %%
SIZES = dict(
    vocab_size=tokenizer.vocab_size,
    d_model=96,
    num_layers=3,
    num_heads=4,
    max_seq_len=128,
    init_std=0.05,
)
EXPERTS = dict(num_experts=8, top_k=2, d_ff=128)
models = {
    "dense": ph.build("llama", seed=0, d_ff=256, **SIZES),
    "unbalanced": ph.build("mixtral", seed=0, **EXPERTS, **SIZES),
    "balanced": ph.build("mixtral", seed=0, **EXPERTS, **SIZES),
}
STEPS, ROWS, LENGTH = 400, 16, 64


def batch(source: dict[str, torch.Tensor], seed: int, rows: int = ROWS) -> torch.Tensor:
    """Half of the rows prose, half code."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for ids in source.values():
        starts = torch.randint(len(ids) - LENGTH - 1, (rows // 2,), generator=generator).tolist()
        found += [ids[start : start + LENGTH + 1] for start in starts]
    return torch.stack(found)


def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")


for name, model in models.items():
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=STEPS, pct_start=0.2
    )
    began = time.perf_counter()
    for step in range(STEPS):
        with routing(model) as logits:  # what routers say, with its gradients
            loss = loss_of(model, batch(learned, step)).mean()
        if name == "balanced":
            loss = loss + 0.1 * load_balance_loss(logits, 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        scored = torch.cat([loss_of(model, batch(held_out, seed, 32)) for seed in range(900, 904)])
    print(
        f"{name:<11}{model.num_parameters():>10,} parameters, held-out loss {scored.mean():.3f}, "
        f"taught in {time.perf_counter() - began:.0f} s"
    )

# %% [markdown]
# ## Who is sent where
#
# The share of the choices that each expert gets; even would be an eighth. Without the balance loss one
# expert takes most of what there is to choose and others are hardly asked: weights that are memory for nothing.
# With it the load is more even, though not even.

# %%
rows = batch(held_out, 1000, 64)[:, :-1]
figure, both = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
for axes, name in zip(both, ("unbalanced", "balanced"), strict=True):
    load = expert_load(models[name], rows)
    for layer, (share, times) in enumerate(
        zip(load.share.values(), load.imbalance().values(), strict=True)
    ):
        axes.bar(
            torch.arange(8) + 0.27 * (layer - 1),
            share,
            0.25,
            label=f"layer {layer}: busiest {times:.1f} × even",
        )
    axes.axhline(1 / 8, color="grey", linestyle=":")
    axes.set(title=name, xlabel="expert", ylim=(0, 0.7))
    axes.legend(fontsize=8)
both[0].set_ylabel("share of the choices")
plt.show()

# %% [markdown]
# ## What experts are for
#
# Do they divide the work by kind of text? Of the tokens that choose an expert first, the share that is code
# (half is no preference, and 0 % may be an expert that is no one's first), and the tokens that each takes far more often than others do.

# %%
load = expert_load(models["balanced"], rows)
is_code = torch.arange(len(rows)) >= len(rows) // 2
for layer, chosen in enumerate(load.chosen.values()):
    first = chosen[..., 0]
    shares = [
        float(is_code[:, None].expand_as(first)[first == expert].float().mean())
        for expert in range(8)
    ]
    print(f"layer {layer}: share of code " + " ".join(f"{share:5.0%}" for share in shares))
last = list(load.chosen.values())[-1][..., 0]
every = torch.bincount(rows.flatten(), minlength=tokenizer.vocab_size).float()
for expert in range(8):
    own = torch.bincount(rows[last == expert], minlength=tokenizer.vocab_size).float()
    lift = own / own.sum().clamp_min(1) * every.sum() / every.clamp_min(1)
    best = lift.masked_fill(own < 5, 0).topk(8)
    words = [
        tokenizer.decode([int(i)])
        for i, times in zip(best.indices, best.values, strict=True)
        if times > 2
    ]
    print(f"expert {expert}: {words}")

# %% [markdown]
# ## Without an expert
#
# A router's logits are a place like any other: lowered by much, an expert is never chosen, and tokens go to
# the next best. What that costs on each kind of text, in nats a token:

# %%
place = list(load.chosen)[-1]
scored = batch(held_out, 2000, 64)
with torch.no_grad():
    whole = loss_of(models["balanced"], scored).mean(1)
    print(f"{'without':>10}{'prose':>9}{'code':>9}")
    for expert in range(8):
        away = F.one_hot(torch.tensor(expert), 8).float()
        with ph.replace(models["balanced"], place, "routing", steered(away, -1e4)):
            rise = loss_of(models["balanced"], scored).mean(1) - whole
        print(f"{expert:>10}{rise[~is_code].mean():>+9.3f}{rise[is_code].mean():>+9.3f}")
