# %% [markdown]
# # Reading SmolLM2's heads
#
# Which of 270 heads do what can be told without reading a single weight matrix: by where they look, and by
# what breaks without them. The first is a guess, the second a test; this notebook does both.

# %%
# %matplotlib inline
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.explain import plots
from polyhead.explain.heads import head_scores, repeated
from polyhead.explain.lens import LogitLens, direct_logit_attribution
from polyhead.explain.patching import patching_grid
from polyhead.text.pieces import pieces

model, tokenizer = ph.load("smollm2-135m", dtype="float32"), ph.tokenizer("smollm2-135m")
print(
    f"{model.config.num_layers} layers of {model.config.num_heads} heads, {model.num_parameters():,} parameters"
)

# %% [markdown]
# ## A page to walk through
#
# Everything at once: the heads that stand out are named above, with a token that shows it. Click one.

# %%
SAID = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went to the park, John gave"
ph.inside(model, tokenizer, SAID, title="SmolLM2-135M")

# %% [markdown]
# ## Induction heads
#
# On random tokens that are written twice nothing can be foretold but by copying: find the token's first
# place, and say what followed it there (Olsson et al. 2022). Heads that look at just that place:

# %%
ids = repeated(torch.arange(100, 40_000), length=50, rows=4, begin=0)
scores = head_scores(model, ids)
named = scores.best("induction", least=0.4)
for head in named:
    print(f"layer {head.layer}, head {head.head}: {head.value:.2f} of its weight")
plots.layer_heads(scores.table("induction"), title="weight on what followed the last time")

# %% [markdown]
# That is a correlation. The test: knock them out, and see whether copying ends, beside as many others
# drawn at random, ten times.

# %%
others = repeated(torch.arange(100, 40_000), length=50, rows=4, seed=7, begin=0)


def second_time(heads: list[tuple[int, int]]) -> float:
    """The loss on the second writing, in nats a token."""
    with ph.knock_out(model, heads), torch.no_grad():
        logits = model(others[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), others[:, 1:], reduction="none")
    return float(losses[:, 50:].mean())


whole = second_time([])
heads = [(head.layer, head.head) for head in named]
generator = torch.Generator().manual_seed(0)
rises = []
for _ in range(10):
    drawn = torch.randperm(270, generator=generator)[: len(heads)].tolist()
    rises.append(second_time([(i // 9, i % 9) for i in drawn]) - whole)
without = second_time(heads) - whole
print(
    f"whole {whole:.2f}; without the named {without:+.2f}; without others {min(rises):+.2f} to {max(rises):+.2f}"
)
assert without > 5 * sum(map(abs, rises)) / len(rises)

# %% [markdown]
# `make recipe NAME=induction` does this with more draws, and on prose; its figures are in
# `docs/explain.md`.
#
# ## Which layer knows the answer?
#
# The lens lets the head read each layer's states: the answer comes late, and all at once.

# %%
prompt = torch.tensor([tokenizer.encode("The capital of France is")])
tops = LogitLens(model).layers(prompt)
table = {
    name.split(".")[2]: (
        pieces(tokenizer, top.indices[0, -1, :3].tolist()),
        top.values[0, -1, :3].exp(),
    )
    for name, top in tops.items()
}
for layer in list(table)[::3] + list(table)[-1:]:
    words, shares = table[layer]
    print(
        f"layer {layer:>2}: "
        + ", ".join(
            f"{word!r} {share:.0%}" for word, share in zip(words, shares.tolist(), strict=True)
        )
    )

# %% [markdown]
# ## Which part says so?
#
# On the straight way to the logit every head and feed-forward layer adds its share; together they *are* the
# logit.

# %%
parts = direct_logit_attribution(model, prompt)
print(
    f"logit {float(parts.total):.2f} = sum of {parts.heads[0].numel() + 2 * len(parts.ffn[0]) + 2} parts {float(parts.sum):.2f}"
)
best = parts.heads[0].flatten().topk(5)
for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"head {place // 9}.{place % 9}: {value:+.2f}")
ffn = parts.ffn[0].topk(3)
for value, layer in zip(ffn.values.tolist(), ffn.indices.tolist(), strict=True):
    print(f"feed-forward of layer {layer}: {value:+.2f}")

# %% [markdown]
# ## Where does it stand?
#
# Two questions that differ in one word. Put one run's states into the other, layer by layer and token by
# token, and see where that turns the answer: the country's token at first, the last token in the end.

# %%
clean = torch.tensor([tokenizer.encode("The capital of France is the city of")])
other = torch.tensor([tokenizer.encode("The capital of Italy is the city of")])
assert clean.shape == other.shape
(paris,) = tokenizer.encode(" Paris")
(rome,) = tokenizer.encode(" Rome")


def paris_beside_rome(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, paris] - logits[:, -1, rome]


grid = patching_grid(model, clean, other, paris_beside_rome)
names = pieces(tokenizer, other[0].tolist())
figure = plots.heatmap(
    grid.effect,
    [f"layer {i}" for i in range(30)],
    names,
    "how much of the answer one state brings back",
    signed=True,
)
figure.axes[0].set(xlabel="token whose state is put in", ylabel="")
figure
