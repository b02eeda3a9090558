# %% [markdown]
# # The ladder
#
# Language models in the order of their invention, on the same text, each given the same arithmetic to learn
# with: what a rung does better than the one below it is what it has that is new, not more computing.
# `polyhead ladder` climbs for as long as you like; here each rung has 200 GFLOP, some seconds.
# [docs/ladder.md](../docs/ladder.md) says how width, steps and learning rates are chosen, and has the table of
# a climb that is 20 times as long.

# %%
# %matplotlib inline
import contextlib
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt

from polyhead.cli.corpora import pydocs
from polyhead.cli.main import main

Path("text.txt").write_text(pydocs(), encoding="utf-8")  # Python's documentation, always there
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    main("ladder text.txt --flops 200G --context 64 --batch-size 16 --out ladder --json".split())
ladder = json.loads(printed.getvalue())
rungs = ladder["rungs"]
print(f"{'rung':<11}{'weights':>9}{'a token':>9}{'tokens':>9}{'seconds':>9}{'bits a byte':>13}")
for name, rung in rungs.items():
    print(
        f"{name:<11}{rung['parameters']:>9,}{rung.get('weights_per_token', ''):>9}"
        f"{rung['tokens']:>9,}{rung['seconds']:>9.1f}{rung['bits_per_byte']:>13.3f}"
    )

# %% [markdown]
# ## Height by rung
#
# Bits a byte on text that none has seen; lower is better. The n-gram, which counts and has no arithmetic
# budget, is the line to beat: modified Kneser-Ney is a strong model of a short text, and so small a budget
# does not beat it. The colours are the time that each rung took, as equal arithmetic is not equal time:
# many small products wait for one another.

# %%
names = [name for name in rungs if name != "ngram"]
seconds = [rungs[name]["seconds"] for name in names]
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
colours = plt.get_cmap("viridis")([0.15 + 0.75 * one / max(seconds) for one in seconds])
bars = axes.bar(names, [rungs[name]["bits_per_byte"] for name in names], color=colours)
axes.bar_label(
    bars,
    [
        f"{rungs[name]['bits_per_byte']:.2f}\n{one:.0f} s"
        for name, one in zip(names, seconds, strict=True)
    ],
)
counted = rungs["ngram"]["bits_per_byte"]
axes.axhline(counted, color="grey", linestyle=":")
axes.text(5.5, counted, f"n-gram\n{counted:.2f}", color="dimgrey", va="center")
axes.set(ylabel="bits a byte, held out", ylim=(1, 4))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## How each learned
#
# A run's `log.jsonl` has what was said as it learned. Those that look back by attention are ahead from early on;
# the LSTM, whose state must first learn to hold anything, is the slowest to begin (with twenty times the
# budget it passes the window, and GPT).

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
for name in names:
    lines = (Path("ladder/runs") / name / "log.jsonl").read_text().splitlines()
    seen = [line for line in map(json.loads, lines) if "valid_bits_per_byte" in line]
    axes.plot(
        [line["step"] for line in seen], [line["valid_bits_per_byte"] for line in seen], label=name
    )
axes.axhline(counted, color="grey", linestyle=":", label="n-gram")
axes.set(xlabel="step", ylabel="bits a byte, held out")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What each writes
#
# Each goes on from the same words, at temperature 1 with nothing cut off.

# %%
for name, rung in rungs.items():
    print(f"--- {name}: {' '.join(rung['sample'].split())[:160]}")

# %% [markdown]
# Every trained rung is a run directory like any other: `polyhead generate ladder/runs/llama "def "` writes
# with it, `polyhead explain` shows what it looks at, `polyhead compare ladder/runs/gpt ladder/runs/llama` says
# what differs.
