# %% [markdown]
# # Encoder, decoder, encoder-decoder on one task
#
# Three ways to put the same blocks together, at one small task whose answers are known: English numbers
# into Spanish ones. *four hundred thirty one thousand two* becomes *cuatrocientos treinta y un mil dos*:
# words join, part, move, and take another form before *mil*. Because the pairs are made by rule, it is
# also known which word comes from which, so that what cross-attention aligns can be marked.

# %%
import random
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.explain import plots
from polyhead.explain.alignment import alignment, alignment_error_rate, hard_alignment

torch.manual_seed(0)
random.seed(0)
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
UNOS = "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete dieciocho diecinueve".split()
VEINTI = "veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve".split()
DECENAS = "- - - treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
CIENTOS = "- ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos".split()
Links = set[tuple[int, int]]


class Pair:
    """Words of both, with the links that are sure and those that are no error."""

    def __init__(self) -> None:
        self.en: list[str] = []
        self.es: list[str] = []
        self.sure: Links = set()
        self.possible: Links = set()

    def add(self, en: str, es: str, sure: str, maybe: str = "") -> None:
        """Links are written as pairs of digits: source and target word, counted from here."""
        at = len(self.en), len(self.es)
        self.en += en.split()
        self.es += es.split()
        for link in (sure + " " + maybe).split():
            self.possible.add((at[0] + int(link[0]), at[1] + int(link[1])))
        self.sure |= {(at[0] + int(link[0]), at[1] + int(link[1])) for link in sure.split()}

    def below_thousand(self, number: int, before_mil: bool) -> None:
        hundreds, rest = divmod(number, 100)
        if hundreds:
            es = "cien" if hundreds == 1 and not rest else CIENTOS[hundreds]
            self.add(f"{ONES[hundreds]} hundred", es, "00", "10")
        tens, one = divmod(rest, 10)
        unos = ["un" if before_mil and word == "uno" else word for word in UNOS]
        if 0 < rest < 20:
            self.add(ONES[rest], unos[rest], "00")
        elif tens == 2:
            es = "veintiún" if before_mil and one == 1 else VEINTI[one]
            self.add(f"twenty {ONES[one]}" if one else "twenty", es, "00 10" if one else "00")
        elif rest:
            if one:
                self.add(
                    f"{TENS[tens]} {ONES[one]}", f"{DECENAS[tens]} y {unos[one]}", "00 12", "01 11"
                )
            else:
                self.add(TENS[tens], DECENAS[tens], "00")


def pair(number: int) -> Pair:
    found = Pair()
    thousands, rest = divmod(number, 1000)
    if thousands == 1:
        found.add("one thousand", "mil", "10", "00")
    elif thousands:
        found.below_thousand(thousands, before_mil=True)
        found.add("thousand", "mil", "00")
    found.below_thousand(rest, before_mil=False)
    return found


for number in (431_002, 1_121, 21_900):
    print(number, "|", " ".join(pair(number).en), "|", " ".join(pair(number).es))

# %%
drawn = random.sample(range(1, 1_000_000), 21_000)
train, test = [pair(n) for n in drawn[:20_000]], [pair(n) for n in drawn[20_000:]]
words = sorted({word for one in train for word in one.en + one.es})
PAD, BEGIN, END, MASK = range(4)
ids = {word: number + 4 for number, word in enumerate(words)}
names = ["<pad>", "<s>", "</s>", "<mask>", *words]
S, T = max(len(one.en) for one in train) + 1, max(len(one.es) for one in train) + 1
print(f"{len(words)} words; at most {S - 1} of a source and {T - 1} of a target")


def rows(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources `[B, S]` and targets `[B, T]`, each with its end, padded."""
    sources, targets = torch.full((len(pairs), S), PAD), torch.full((len(pairs), T), PAD)
    for row, one in enumerate(pairs):
        for into, said in ((sources, one.en), (targets, one.es)):
            into[row, : len(said) + 1] = torch.tensor([*(ids[word] for word in said), END])
    return sources, targets


sources, targets = rows(train)
test_sources, test_targets = rows(test)

# %% [markdown]
# ## Three ways
#
# - The **encoder-decoder** reads the source both ways, and writes word by word, looking at what it read.
# - The **decoder** has one text: source, then target. It sees the source from the left only.
# - The **encoder** reads the source and a mask for every place of the target, and fills all at once.
#
# Each has four layers in all; the two stacks with cross-attention have a quarter more parameters than one stack.

# %%
SIZES = dict(
    vocab_size=len(names),
    d_model=96,
    d_ff=192,
    num_heads=4,
    norm_first=True,
    max_seq_len=S + T + 1,
    position="learned",
)


def build(kind: str) -> torch.nn.Module:
    layers = 2 if kind == "encoder-decoder" else 4
    return ph.build("transformer", kind=kind, num_layers=layers, seed=0, **SIZES)


def begun(target: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(target[:, :1], BEGIN), target[:, :-1]], 1)


def logits_of(
    kind: str, model: torch.nn.Module, source: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """What is said of the target's places `[B, T, V]`."""
    if kind == "encoder-decoder":
        return model(source, begun(target), attention_mask=(source != PAD).long())
    if kind == "decoder":
        return model(torch.cat([source, begun(target)], 1))[:, -target.shape[1] :]
    return model(torch.cat([source, torch.full_like(target, MASK)], 1))[:, -target.shape[1] :]


@torch.no_grad()
def written(kind: str, model: torch.nn.Module, source: torch.Tensor) -> torch.Tensor:
    """The likeliest words, one after the other; the encoder's all at once."""
    found = torch.full((len(source), T), PAD)
    if kind == "encoder":
        return logits_of(kind, model, source, found).argmax(-1)
    for at in range(T):
        found[:, at] = logits_of(kind, model, source, found[:, : at + 1])[:, at].argmax(-1)
    return found


def right(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of numbers without any mistake, up to the end of each."""
    return float(((found == wanted) | (wanted == PAD)).all(1).float().mean())


STEPS, BATCH = 700, 64
models, told = {}, {}
for kind in ("encoder-decoder", "decoder", "encoder"):
    model = build(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=STEPS, pct_start=0.2
    )
    began, curve = time.perf_counter(), []
    for step in range(STEPS):
        some = torch.randint(len(sources), (BATCH,), generator=torch.Generator().manual_seed(step))
        source, target = sources[some], targets[some]
        loss = F.cross_entropy(
            logits_of(kind, model, source, target).transpose(1, 2), target, ignore_index=PAD
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    taught = time.perf_counter() - began
    models[kind] = model.eval()
    began = time.perf_counter()
    exact = right(written(kind, model, test_sources), test_targets)
    told[kind] = curve
    print(
        f"{kind:<16}{model.num_parameters():>8,} parameters, taught {taught:3.0f} s, loss {curve[-1]:.4f}, "
        f"{exact:.1%} of {len(test)} new numbers without mistake, written in {time.perf_counter() - began:.1f} s"
    )

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for kind, curve in told.items():
    axes.plot(curve, label=kind)
axes.set(xlabel="step", ylabel="loss of the target's words", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# The encoder answers in one forward and cannot take back or build on what it has said: what it writes at a
# place does not know what stands before. The other two write word by word, and need a forward for each (or
# a cache, as `ph.TextGenerator` has).
#
# ## What cross-attention aligns
#
# A step of the encoder-decoder looks at the source before it writes. Which source word gets most, marked
# against the links that are known:

# %%
one = pair(431_002)
source, target = rows([one])
weights = alignment(
    models["encoder-decoder"], source, begun(target), where="backbone.decoder.layers.1.cross"
)
weights = weights[0, : len(one.es), : len(one.en)]
plots.heatmap(weights, one.es, one.en, "layer 1, mean of heads")

# %% [markdown]
# ## Beside a statistical aligner
#
# IBM's model 1 (Brown et al. 1993) knows nothing but how often words stand in the same pair, and learns
# from 4,000 of the same pairs, in a few rounds of expectation and maximisation:

# %%
V = len(names)
table = torch.full((V, V), 1.0 / V)  # a target word by a source word; row 0 is no word at all
pairs_in = [([0, *(ids[w] for w in p.en)], [ids[w] for w in p.es]) for p in train[:4000]]
for _ in range(8):
    counts = torch.zeros(V, V)
    for en, es in pairs_in:
        shares = table[en][:, es]
        counts.index_put_(
            (torch.tensor(en)[:, None], torch.tensor(es)[None]),
            shares / shares.sum(0),
            accumulate=True,
        )
    table = counts / counts.sum(1, keepdim=True).clamp_min(1e-9)


def by_counts(one: Pair) -> Links:
    shares = table[[ids[w] for w in one.en]][:, [ids[w] for w in one.es]]
    return {(int(best), at) for at, best in enumerate(shares.argmax(0))}


@torch.no_grad()
def by_attention(one: Pair, where: str, heads: list[int] | None = None) -> Links:
    source, target = rows([one])
    found = alignment(models["encoder-decoder"], source, begun(target), where=where, heads=heads)[0]
    return hard_alignment(found[: len(one.es), : len(one.en)])


marked = test[:200]
sure, possible = [p.sure for p in marked], [p.possible for p in marked]
print(
    f"model 1: {alignment_error_rate(map(by_counts, marked), sure, possible):.1%} alignment error"
)
for layer in (0, 1):
    where = f"backbone.decoder.layers.{layer}.cross"
    mean = alignment_error_rate([by_attention(p, where) for p in marked], sure, possible)
    each = [
        alignment_error_rate([by_attention(p, where, [h]) for p in marked], sure, possible)
        for h in range(4)
    ]
    print(
        f"cross-attention of layer {layer}: {mean:.1%} by the mean of heads; by head "
        + ", ".join(f"{e:.1%}" for e in each)
    )

# %% [markdown]
# Attention is no aligner by trade: a head may look a word ahead, or at the end of the source, and the answer
# still be right. In the run shown the last layer's heads together come nearer to the truth than counting
# does, and the first layer's are far from it: say which layer, before a heatmap is read as an alignment.
