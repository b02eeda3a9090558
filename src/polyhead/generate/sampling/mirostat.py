"""Mirostat: a text whose surprise stays where it is wanted (Basu et al. 2020).

`N` rows, `V` tokens of the vocabulary. mu `[N]`, in bits, starts at twice the target and is the
state of a row. Numbers as in llama.cpp.
"""

import math

import torch
from torch import Tensor

from polyhead.generate.sampling.filters import keep_top_k, without

_ESTIMATED_FROM = 100


def keep_unsurprising(logits: Tensor, mu: Tensor) -> Tensor:
    """Version 2: keep tokens of at most `mu` bits of surprise, and the most likely one."""
    bits = logits.log_softmax(1).div_(-math.log(2))
    remove = (bits > mu[:, None]) & (logits < logits.amax(1, keepdim=True))
    return without(logits, remove)


def keep_zipf(logits: Tensor, mu: Tensor) -> Tensor:
    """Version 1: keep the k most likely tokens; k from `mu` and the exponent of Zipf's law.

    The exponent is estimated from the 100 most likely.
    """
    vocab = logits.shape[1]
    best = logits.softmax(1).topk(min(_ESTIMATED_FROM, vocab), dim=1).values
    rank = torch.arange(1, best.shape[1], device=logits.device, dtype=logits.dtype)
    ranks = ((rank + 1) / rank).log()
    falls = (best[:, :-1] / best[:, 1:]).log().nan_to_num(0.0, 0.0, 0.0)
    exponent = (ranks * falls).sum(1) / (ranks * ranks).sum()
    excess = exponent - 1
    k = ((excess * 2**mu) / (1 - vocab**-excess)) ** (1 / exponent)
    return keep_top_k(logits, k.nan_to_num(vocab).clamp(1, vocab).long())


def surprise(kept: Tensor, ids: Tensor) -> Tensor:
    """Bits `[N]` of the drawn ids `[N]` among what was kept, logits `[N, V]`."""
    return kept.log_softmax(1).gather(1, ids[:, None])[:, 0] / -math.log(2)


def follow(mu: Tensor, surprise: Tensor, tau: float, eta: float) -> Tensor:
    """The next mu `[N]`, after a token of this surprise."""
    return mu - eta * (surprise - tau)
