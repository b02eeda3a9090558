"""Less likely what was there before. `N` rows, `V` tokens of the vocabulary, `L` tokens so far.

Every transform takes one parameter a row, returns new logits and leaves the caller's as they were.
Tokens so far `[N, L]` end at the right; -1 stands where a shorter row has none.
"""

import math

import torch
from torch import Tensor

_REACH = 64
_MOST_LOSS = 80.0  # natural logarithm of what float32 still holds


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the tokens `seen` `[N, L]` less likely: positive logits / penalty, negative × penalty.

    logits `[N, V]`, penalty `[N]`. A token seen twice is penalized once (Keskar et al. 2019).
    """
    seen = torch.where(seen < 0, seen[:, -1:], seen)
    score = logits.gather(1, seen)
    penalty = penalty[:, None]
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, seen, score)


def penalize_counts(logits: Tensor, drawn: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """logit - count × frequency - (count > 0) × presence, as OpenAI documents.

    logits `[N, V]`; drawn `[N, L]` the generated tokens, -1 for none; presence, frequency `[N]`.
    """
    tokens = drawn.clamp(min=0)
    counted = (drawn >= 0).to(logits.dtype)
    count = torch.zeros_like(logits).scatter_add_(1, tokens, counted).gather(1, tokens)
    loss = count * frequency[:, None] + (count > 0) * presence[:, None]
    return logits.scatter(1, tokens, logits.gather(1, tokens) - loss)


def penalize_runs(
    logits: Tensor,
    tokens: Tensor,
    breaks: Tensor,
    multiplier: Tensor,
    base: Tensor,
    allowed: Tensor,
) -> Tensor:
    """DRY: what would make n tokens come again loses multiplier × base^(n - allowed).

    logits `[N, V]`; tokens, and whether each breaks runs, `[N, L]`; the rest `[N]`. Of a token
    that several runs lead to, the longest counts; runs shorter than `allowed`, none. A token that
    breaks runs is never penalized (p-e-w, text-generation-webui #5677).
    """
    rows, after, length = _runs(tokens, breaks)
    over = (length - allowed[rows]).to(logits.dtype)
    exponent = (over * base[rows].log()).clamp(max=_MOST_LOSS)
    loss = torch.where(over >= 0, multiplier[rows] * exponent.exp(), 0.0)
    places, which = torch.unique(rows * logits.shape[1] + after, return_inverse=True)
    most = loss.new_zeros(len(places)).scatter_reduce(0, which, loss, "amax")
    row, token = places // logits.shape[1], places % logits.shape[1]
    return logits.index_put((row, token), logits[row, token] - most.to(logits.dtype))


def _runs(tokens: Tensor, breaks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the last tokens of a row stood before: its row, the token that followed, how many.

    `[C]` each, for C places, over all rows. tokens, breaks `[N, L]`.
    """
    same = (tokens[:, :-1] == tokens[:, -1:]) & ~breaks[:, -1:] & ~breaks[:, 1:]
    rows, places = same.nonzero(as_tuple=True)
    length = torch.zeros_like(places)
    alive = torch.arange(len(places), device=tokens.device)
    for start in range(0, tokens.shape[1], _REACH):
        back = torch.arange(start, start + _REACH, device=tokens.device)
        row, there = rows[alive, None], places[alive, None] - back
        here = tokens.shape[1] - 1 - back[None]
        found = tokens[row, there.clamp(min=0)]
        alike = (found == tokens[row, here.clamp(min=0)]) & (there >= 0) & (found >= 0)
        run = (alike & ~breaks[row, here.clamp(min=0)]).long().cumprod(1).sum(1)
        length[alive] += run
        alive = alive[run == _REACH]
        if not len(alive):
            break
    return rows, tokens[rows, places + 1], length


def favor_ends(
    logits: Tensor, rows: Tensor, ends: Tensor, further: Tensor, factor: Tensor
) -> Tensor:
    """End tokens gain |logit| × (factor^further - 1) once `further` tokens are too many.

    logits `[N, V]`; rows, ends, further, factor `[C]`: one entry for each end token of a row.
    """
    score = logits[rows, ends]
    grown = (further.clamp(min=0) * factor.log()).clamp(max=math.log(1e30)).exp() - 1
    gain = torch.where(score.isfinite(), score.abs() * grown, 0.0)
    return logits.index_put((rows, ends), score + gain.to(score.dtype))
