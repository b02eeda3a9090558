"""Which tokens may be drawn. `N` rows, `V` tokens of the vocabulary.

Every filter takes one parameter a row, returns new logits and leaves the caller's as they were.
Removed tokens get -inf.
"""

import torch
from torch import Tensor

from polyhead.generate.sampling.draw import log_total as whole

_ROUNDING = 5e-7  # of a probability that comes from float32 logits


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the `k` `[N]` largest logits of a row, and what ties with the last of them; 0 keeps all.

    logits `[N, V]`.
    """
    k = k.clamp(max=logits.shape[1])
    largest = logits.topk(int(k.max()), dim=1).values if k.any() else logits[:, :1]
    last = largest.gather(1, (k - 1).clamp(min=0)[:, None])
    return logits.masked_fill((logits < last) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Keep the fewest most likely tokens that reach probability `p` `[N]` together; 1 keeps all.

    logits `[N, V]`. Where they are only the largest logits of a row, log_total `[N, 1]` is the
    log-sum-exp of all of them. The token that crosses p stays; of equal ones, the first.
    """
    if log_total is None:
        log_total = whole(logits)
    descending, order = logits.sort(dim=1, descending=True, stable=True)
    likely = (descending - log_total).exp()
    before = likely.cumsum(1) - likely
    remove = (before > p[:, None] - _ROUNDING) & (p < 1)[:, None]
    remove[:, 0] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter_(1, order, remove), -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least `p` `[N]` times as likely as the most likely one. logits `[N, V]`."""
    likely = logits.softmax(1)
    best = likely.amax(1, keepdim=True)
    # The best itself stays even where p × best is rounded up.
    remove = (likely < p[:, None] * best) & (likely < best)
    return logits.masked_fill(remove, -torch.inf)


def keep_typical(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the fewest tokens, the most typical first, that reach probability `mass` `[N]` together.

    logits `[N, V]`. Typical is a surprise near its expectation (Meister et al. 2022); what is as
    typical as the last that stays, stays too. 1 keeps all.
    """
    logprobs = logits.log_softmax(1)
    likely = logprobs.exp()
    entropy = -(logprobs * likely).nansum(1, keepdim=True)
    shift = (-logprobs - entropy).abs()
    order = shift.argsort(dim=1)
    reached = logits.gather(1, order).softmax(1).cumsum(1)
    last = (reached < mass[:, None]).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
    remove = shift > shift.gather(1, order.gather(1, last))
    return logits.masked_fill(remove & (mass < 1)[:, None], -torch.inf)


def keep_epsilon(logits: Tensor, epsilon: Tensor) -> Tensor:
    """Keep tokens of at least probability `epsilon` `[N]`, and the most likely. logits `[N, V]`."""
    remove = (logits.softmax(1) < epsilon[:, None]) & (logits < logits.amax(1, keepdim=True))
    return logits.masked_fill(remove, -torch.inf)


def keep_eta(logits: Tensor, eta: Tensor) -> Tensor:
    """Keep tokens of at least probability min(eta, sqrt(eta) × exp(-entropy)) (Hewitt et al. 2022).

    logits `[N, V]`, eta `[N]`. 0 keeps all.
    """
    logprobs = logits.log_softmax(1)
    entropy = -(logprobs * logprobs.exp()).nansum(1)
    return keep_epsilon(logits, torch.minimum(eta, eta.sqrt() * (-entropy).exp()))
