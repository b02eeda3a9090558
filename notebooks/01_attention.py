# %% [markdown]
# # Attention, from scratch to ours
#
# One head with loops, then with matrices, then several heads, masks, fewer keys than queries and a
# cache. Every step gives the numbers of Polyhead's parts, and each cell says how close.

# %%
import math

import torch
import torch.nn.functional as F

from polyhead.explain.page import page_of
from polyhead.nn.attend import attend, weights
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import GrowingCache
from polyhead.nn.mask import Mask

torch.manual_seed(0)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.1e}")
    assert difference < 1e-5


# %% [markdown]
# ## One query at a time
#
# A query is compared with every key; the softmax of the comparisons says how much of each value is
# taken (Vaswani et al. 2017, equation 1). Nothing else is in it.

# %%
T, D = 6, 8
q, k, v = torch.randn(3, T, D)


def one_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(v)
    for i in range(len(q)):
        scores = [float(q[i] @ k[j]) / math.sqrt(D) for j in range(len(k))]
        highest = max(scores)  # so that no exponential overflows
        shares = [math.exp(score - highest) for score in scores]
        for j in range(len(k)):
            found[i] += shares[j] / sum(shares) * v[j]
    return found


by_loops = one_head(q, k, v)

# %% [markdown]
# The same as one line of matrices, and as the definition in `polyhead/nn/attend.py`, whose shapes are
# `[B, H, T, D]`: a batch, heads, tokens, their width.

# %%
by_matrices = (q @ k.T / math.sqrt(D)).softmax(-1) @ v
close(by_matrices, by_loops)
defined = weights(q[None, None], k[None, None], scale=D**-0.5)
close((defined @ v)[0, 0], by_loops)

# %% [markdown]
# The weights are never needed as a matrix: the *fused* kernel goes over keys block by block and keeps a
# running sum. It is what every layer uses as long as nobody looks.

# %%
fused = attend(q[None, None], k[None, None], v[None, None], scale=D**-0.5)
close(fused[0, 0], by_loops)

# %% [markdown]
# ## What may be seen
#
# A mask says which keys a query may see: those that are not are given no share at all. Masks are values
# that combine: causal, a window, padding.

# %%
causal = torch.ones(T, T).tril().bool()
scores = (q @ k.T / math.sqrt(D)).masked_fill(~causal, -math.inf)
by_hand = scores.softmax(-1) @ v
lowered = Mask(causal=True).lower(T, T, q.device)
close(attend(q[None, None], k[None, None], v[None, None], lowered, scale=D**-0.5)[0, 0], by_hand)

window = Mask(causal=True, window=3)  # the token itself counts
print(window.lower(T, T, q.device).boolean(T, T, q.device).int().squeeze())

# %% [markdown]
# ## Several heads, and a layer
#
# A layer projects what it reads into queries, keys and values, cuts them into heads, lets each head look
# for itself, and projects what they found back. Fewer key heads than query heads (GQA) share their keys.

# %%
E, H, G = 32, 4, 2
layer = MultiHeadAttention(E, H, num_kv_heads=G)
x = torch.randn(1, T, E)
with torch.no_grad():
    queries = layer.q(x).view(1, T, H, -1).transpose(1, 2)
    keys, values = (part(x).view(1, T, G, -1).transpose(1, 2) for part in (layer.k, layer.v))
    keys, values = (part.repeat_interleave(H // G, dim=1) for part in (keys, values))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(E // H)
    shares = scores.masked_fill(~causal, -math.inf).softmax(-1)
    heads = (shares @ values).transpose(1, 2).flatten(2)
    by_hand = layer.out(heads)
    close(layer(x, mask=Mask(causal=True)), by_hand)

# %% [markdown]
# torch's own kernel agrees, too:

# %%
theirs = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
close(theirs.transpose(1, 2).flatten(2), heads)

# %% [markdown]
# ## Token by token
#
# Keys and values of what was read do not change while more is written. So a *cache* keeps them, and each
# new token is one query. The answer is that of the whole text.

# %%
cache = GrowingCache(1, G, E // H, like=x)
with torch.no_grad():
    steps = [layer(x[:, i : i + 1], mask=Mask(causal=True), cache=cache) for i in range(T)]
    close(torch.cat(steps, 1), by_hand)

# %% [markdown]
# ## To look at
#
# The four heads of this untaught layer: each row's lines sum to one. Choose heads on the left, hold a
# token, or switch to the heatmap. `06_heads` shows what heads learn to look at.

# %%
page_of(shares, ["one", " two", " three", " four", " five", " six"], title="an untaught layer")
