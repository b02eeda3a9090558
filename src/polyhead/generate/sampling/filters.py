"""Which tokens may be drawn. `N` rows, `V` tokens of the vocabulary.

Every filter takes one parameter a row, returns new logits and leaves the caller's as they were.
Removed tokens get -inf.
"""

import torch
from torch import Tensor

from polyhead.generate.sampling.cut import cut
from polyhead.generate.sampling.draw import log_total as whole

_ROUNDING = 5e-7  # of a probability that comes from float32 logits
_TINY = 1e-30  # above 0, so that the first stays
_LONG = 1024  # beyond it, the k-th is found sooner without a list of the largest


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the `k` `[N]` largest logits of a row, and what ties with the last of them; 0 keeps all.

    logits `[N, V]`.
    """
    k = k.clamp(max=logits.shape[1])[:, None]
    longest = int(k.max())
    if longest > _LONG:
        one = torch.ones((), dtype=torch.float64, device=logits.device)
        last = cut(logits, one.expand_as(logits), k.clamp(min=1)).last
    else:
        last = logits.topk(max(longest, 1), dim=1).values.gather(1, (k - 1).clamp(min=0))
    return without(logits, logits < last.masked_fill(k == 0, -torch.inf))


def keep_top_p(logits: Tensor, p: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Keep the fewest most likely tokens that reach probability `p` `[N]` together; 1 keeps all.

    logits `[N, V]`. Where they are only the largest logits of a row, log_total `[N, 1]` is the
    log-sum-exp of all of them. The token that crosses p stays; of equal ones, the first.
    """
    if log_total is None:
        log_total = whole(logits)
    likely = (logits - log_total).exp_()
    last, staying, tied = cut(logits, likely, (p[:, None] - _ROUNDING).clamp(min=_TINY))
    last = last.masked_fill(p[:, None] >= 1, -torch.inf)
    remove = logits < last
    if ((tied > staying) & (p < 1)[:, None]).any():
        equal = logits == last
        remove |= equal & (equal.cumsum(1) > staying)
    return without(logits, remove)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least `p` `[N]` times as likely as the most likely one. logits `[N, V]`."""
    likely = logits.softmax(1)
    least = p[:, None] * likely.amax(1, keepdim=True)
    return without(logits, likely < least)


def keep_typical(logits: Tensor, mass: Tensor) -> Tensor:
    """Keep the fewest tokens, the most typical first, that reach probability `mass` `[N]` together.

    logits `[N, V]`. Typical is a surprise near its expectation (Meister et al. 2022); what is as
    typical as the last that stays, stays too. 1 keeps all.
    """
    logprobs = logits.log_softmax(1)
    typicality = logprobs.add_(_entropy(logprobs)).abs_().neg_()
    last = cut(typicality, logits.softmax(1).double(), mass[:, None]).last
    last = last.masked_fill(mass[:, None] >= 1, -torch.inf)
    return without(logits, typicality < last)


def keep_epsilon(logits: Tensor, epsilon: Tensor) -> Tensor:
    """Keep tokens of at least probability `epsilon` `[N]`, and the most likely. logits `[N, V]`."""
    remove = (logits.softmax(1) < epsilon[:, None]) & (logits < logits.amax(1, keepdim=True))
    return without(logits, remove)


def keep_eta(logits: Tensor, eta: Tensor) -> Tensor:
    """Keep tokens of at least probability min(eta, sqrt(eta) × exp(-entropy)) (Hewitt et al. 2022).

    logits `[N, V]`, eta `[N]`. 0 keeps all.
    """
    entropy = _entropy(logits.log_softmax(1))[:, 0]
    return keep_epsilon(logits, torch.minimum(eta, eta.sqrt() * (-entropy).exp()))


def _entropy(logprobs: Tensor) -> Tensor:
    """`[N, 1]` of logprobs `[N, V]`, in nats."""
    return -logprobs.exp().mul_(logprobs).nansum(1, keepdim=True)


def without(logits: Tensor, remove: Tensor) -> Tensor:
    """Logits `[N, V]` of which some are -inf."""
    # Divided by what is 1 or 0: on CPUs several times as fast as to choose one by one.
    return logits - remove.logical_not().to(logits.dtype).reciprocal_().sub_(1)
