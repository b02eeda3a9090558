# %% [markdown]
# # How an LLM system is put together
#
# Five components stand between text and an answer: a tokenizer, an architecture, a way to train, an engine
# that generates, and what deploys it. Each offers choices, and each choice costs something somewhere else.
# Here every one is taken apart with Polyhead's own pieces and measured, on two cores. The figures are this
# machine's; the ratios travel better.

# %%
# %matplotlib inline
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polyhead as ph
from polyhead.cli.corpora import pydocs
from polyhead.compress.quantize import weight_bytes
from polyhead.train.flops import training_flops

torch.manual_seed(0)
text = pydocs()
learned, held_out = text[:-40_000], text[-40_000:]
real, real_words = ph.load("smollm2-135m", dtype=torch.bfloat16), ph.tokenizer("smollm2-135m")


def seconds(work: object, times: int = 3) -> float:
    """The least of a few, after one that warms up."""
    work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


# %% [markdown]
# ## 1. Tokenisation
#
# *The choice*: how much text a token is. *What it costs*: a larger vocabulary makes texts shorter, so that each
# byte needs fewer steps and the context reaches further; but every token has a row in the embedding and one
# in the head, and what is rare is learned badly. Trained on some text, tokenizers are short on text like it:
# the last row was trained on the web, not on Python's documentation.

# %%
sample = held_out[:20_000]
tokenizers = {
    "bytes": ph.Tokenizer.train([learned], kind="bytes"),
    "characters": ph.Tokenizer.train([learned], kind="chars"),
    "BPE, 512": ph.Tokenizer.train([learned], kind="bpe", vocab_size=512),
    "BPE, 4096": ph.Tokenizer.train([learned], kind="bpe", vocab_size=4096),
    "SmolLM2's": real_words,
}
print(f"{'':<12}{'tokens':>9}{'bytes a token':>15}{'vectors of 576':>16}{'MB/s':>7}")
for name, tokenizer in tokenizers.items():
    ids = tokenizer.encode(sample)
    size, spent = len(sample.encode()), seconds(partial(tokenizer.encode, sample))
    print(
        f"{name:<12}{tokenizer.vocab_size:>9,}{size / len(ids):>15.2f}"
        f"{tokenizer.vocab_size * 576 / 1e6:>14.1f} M{size / spent / 1e6:>7.1f}"
    )
for name in ("BPE, 512", "SmolLM2's"):
    ids = tokenizers[name].encode("The with statement wraps a block.")
    print(f"{name}: {[tokenizers[name].decode([one]) for one in ids]}")

# %% [markdown]
# ## 2. Architecture
#
# *The choice*: where weights go, and what a token leaves behind for those after it. *What it costs*: weights are
# memory, and arithmetic at every token; keys and values are memory for every token of every text at work,
# which is what limits how many are served at once. Sharing keys among queries (GQA, MQA) or looking
# back only so far (a window) is bought with quality; experts buy weights without arithmetic.

# %%
WIDE = dict(
    vocab_size=49_152, d_model=576, num_layers=30, num_heads=9, d_ff=1536, tie_embeddings=True
)
CHOICES = {
    "multi-head": ("llama", dict(num_kv_heads=9)),
    "grouped, 3 (SmolLM2)": ("llama", dict(num_kv_heads=3)),
    "multi-query": ("llama", dict(num_kv_heads=1)),
    "grouped, window 512": ("mistral", dict(num_kv_heads=3, window=512)),
    "grouped, 2 of 8 experts": ("mixtral", dict(num_kv_heads=3, num_experts=8, top_k=2, d_ff=768)),
}
print(f"{'at 4,096 tokens':<25}{'weights':>9}{'GFLOP a token':>15}{'keys and values':>17}")
for name, (family, sizes) in CHOICES.items():
    with torch.device("meta"):
        made = ph.build(family, **{**WIDE, **sizes, "max_seq_len": 4096})
    kept = min(4096, sizes.get("window", 4096))
    cache = 2 * sizes["num_kv_heads"] * 64 * 30 * kept * 2  # K and V, in bfloat16
    print(
        f"{name:<25}{made.num_parameters() / 1e6:>7.0f} M{training_flops(made, 4096) / 3e9:>15.2f}"
        f"{cache / 1e6:>14.0f} MB"
    )

# %% [markdown]
# ## 3. Training
#
# *The choice*: which weights learn, in how many bits, and what is kept of the forward for the backward. *What it
# costs*: AdamW holds a gradient and two moments beside each weight that learns, 16 bytes in float32; an adapter
# holds them for a hundredth of the weights; a base in four bits shrinks what does not learn. Recomputing the blocks
# buys activations' memory with a third more arithmetic. Each of these takes two steps of 512 tokens in a process of its
# own, whose peak of memory is told.

# %%
STEP = """
import resource, sys, time, torch
import torch.nn.functional as F
import polyhead as ph
from polyhead.train.recompute import recomputing

how = sys.argv[1]
dtype = torch.float32 if "float32" in how else torch.bfloat16
model = ph.load("smollm2-135m", dtype=dtype)
if "4 bits" in how:
    model = ph.quantize(model, "nf4")
if "LoRA" in how or "4 bits" in how:
    ph.add_adapter(model, ph.LoraConfig(rank=16, targets="all-linear"))
model.train()
learning = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(learning, lr=1e-5)
ids = torch.randint(1000, (4, 129))
for step in range(2):
    began = time.perf_counter()
    with recomputing(model, "blocks" if "again" in how else "none"):
        F.cross_entropy(model(ids[:, :-1]).float().transpose(1, 2), ids[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
    spent = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(sum(weight.numel() for weight in learning), peak, spent)
"""
WAYS = (
    "all weights, float32",
    "all weights, bfloat16",
    "all weights, bfloat16, blocks computed again",
    "LoRA, bfloat16",
    "LoRA on 4 bits, blocks computed again",
)
print(f"{'':<46}{'learn':>8}{'peak':>10}{'a step':>8}")
for way in WAYS:
    done = subprocess.run(
        [sys.executable, "-c", STEP, way], capture_output=True, text=True, check=True
    )
    count, peak, spent = (float(one) for one in done.stdout.split())
    print(f"{way:<46}{count / 1e6:>6.0f} M{peak:>7.0f} MB{spent:>6.1f} s")

# %% [markdown]
# What is learned costs as much as how. A token of the text to learn from is read forwards and backwards; the budget in
# FLOPs is six times weights times tokens, and twenty tokens a weight use it best (Hoffmann et al. 2022). For
# this model that is:

# %%
tokens = 20 * real.num_parameters()
flops = tokens * training_flops(real, 2048)
rate = 512 * training_flops(real, 128) / spent
print(
    f"{tokens / 1e9:.1f} G tokens, {flops:.1e} FLOP: {flops / rate / 86400:,.0f} days of the last row's pace here"
)

# %% [markdown]
# ## 4. The engine
#
# *The choice*: what is remembered and who goes together. *What it costs*: without a cache of keys and values, each
# token reads the whole text again. With it, a step reads all weights for one token, so that memory's bandwidth is the
# limit and texts side by side are nearly free, at the price of each waiting for the others and of their keys and values.
# Fewer bits are fewer bytes to read. A prompt that begins like an earlier one is not read again.

# %%
prompt = real_words.encode(held_out)[:256]
NEW = 24


def uncached() -> None:
    """Greedy, every token from a forward of the whole text."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(NEW // 8):
            ids = torch.cat([ids, real(ids)[:, -1:].argmax(-1)], 1)


def write(engine: ph.Engine, rows: int) -> None:
    """NEW tokens after each of so many prompts, side by side."""
    for row in range(rows):
        engine.add(prompt[row : row + 32], CONFIG)
    engine.run()


CONFIG = ph.GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, temperature=0)
forms = {
    "bf16": ph.pack(ph.load("smollm2-135m", dtype=torch.bfloat16)),
    "int8": ph.pack(ph.quantize(ph.load("smollm2-135m"), "int8")),
    "int4": ph.pack(ph.quantize(ph.load("smollm2-135m"), "int4")),
}
plain = NEW // 8 / seconds(uncached, 1)
print(f"no cache: {plain:.1f} tokens/s after {len(prompt)} tokens")
print(f"{'tokens/s':<9}{'alone':>8}{'of 4':>8}{'of 16':>8}")
speeds = {}
for name, form in forms.items():
    engine = ph.Engine(form, real_words, ph.EngineConfig(max_rows=16, cache_tokens=8192))
    speeds[name] = [rows * NEW / seconds(partial(write, engine, rows), 2) for rows in (1, 4, 16)]
    print(f"{name:<9}" + "".join(f"{speed:>8.0f}" for speed in speeds[name]))

engine = ph.Engine(forms["int4"], real_words, ph.EngineConfig(max_rows=4, cache_tokens=4096))
one = ph.GenerationConfig(max_new_tokens=1, temperature=0)
for name, question in (("first", [*prompt, 100]), ("the same beginning", [*prompt, 200])):
    began = time.perf_counter()
    asked = engine.add(question, one)
    engine.run()
    print(
        f"{name}: {1000 * (time.perf_counter() - began):.0f} ms to the first token, {asked.found} tokens found"
    )

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, found in speeds.items():
    axes.plot((1, 4, 16), found, marker="o", label=name)
axes.set(
    xscale="log", xticks=(1, 4, 16), xlabel="texts side by side", ylabel="tokens/s, all together"
)
axes.set_xticks((1, 4, 16), ("1", "4", "16"))
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# ## 5. Deployment
#
# *The choice*: the form on disk, and what is held ready. *What it costs*: a process that is started for one answer pays
# for Python, the library and the weights before its first token, and a process that stays pays in memory. A
# form that other programs read (GGUF for llama.cpp, a Hugging Face directory for the rest) is one line either way.

# %%
ph.load("smollm2-135m", dtype=torch.bfloat16).save("whole")
ph.quantize(ph.load("smollm2-135m"), "int4").save("small")
for folder in ("whole", "small"):
    real_words.save(folder)
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    loading = seconds(lambda folder=folder: ph.load(folder), 1)
    began = time.perf_counter()
    command = f"-m polyhead.cli.main generate {folder} Hello --max-new-tokens 1 --temperature 0"
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True)
    cold = time.perf_counter() - began
    print(
        f"{folder}: {size / 1e6:.0f} MB on disk, loads in {loading:.2f} s, a new process answers in {cold:.1f} s"
    )
bytes_of = {
    name: weight_bytes(ph.quantize(ph.load("smollm2-135m"), name))
    for name in ("bf16", "int8", "int4")
}
a_text = 2 * 3 * 64 * 30 * 1024 * 2
for name, size in bytes_of.items():
    print(
        f"{name}: {size / 1e6:.0f} MB of weights; in 1 GB {(1e9 - size) / a_text:.0f} texts of 1,024 tokens beside them"
    )

# %% [markdown]
# ## What depends on what
#
# | component | chosen for | paid with |
# |---|---|---|
# | tokenizer | fewer steps, further context | rows in embedding and head; rare tokens are learned badly |
# | architecture | keys and values that fit, arithmetic a token | quality at equal size; experts: memory |
# | training | weights that learn, tokens | 16 bytes a weight that learns, six FLOP a weight and token |
# | engine | tokens a second | waiting for one another, memory for keys and values |
# | deployment | time to the first answer, bytes | a process that stays, a little quality for few bits |
#
# None is chosen alone: grouped keys are trained in, four bits are decided by what the engine reads fastest, and the
# tokenizer that makes texts short for one language makes them long for another. The parts are these, and each can be
# exchanged for one of your own: `polyhead/text`, `polyhead/nn` and `polyhead/models`, `polyhead/train`,
# `polyhead/generate` and `polyhead/kernels`, `polyhead/compress` and `polyhead/export`.
