"""What may not come next, and what must. `N` rows, `V` tokens of the vocabulary, `L` tokens so far.

Every transform returns new logits and leaves the caller's as they were; what may not come gets
-inf. Tokens so far `[N, L]` end at the right; -1 stands where a shorter row has none.
"""

import torch
from torch import Tensor


def ban_repeated_ngrams(logits: Tensor, tokens: Tensor, size: int) -> Tensor:
    """No run of `size` tokens comes twice. logits `[N, V]`, tokens `[N, L]`."""
    if tokens.shape[1] < size:
        return logits
    runs = tokens.unfold(1, size, 1)
    last = tokens[:, None, tokens.shape[1] - size + 1 :]
    again = ((runs[..., :-1] == last) & (last >= 0)).all(2) & (runs[..., -1] >= 0)
    row, place = again.nonzero(as_tuple=True)
    return _never(logits, row, runs[row, place, -1])


def bias_runs(logits: Tensor, tokens: Tensor, starts: Tensor, last: Tensor, bias: Tensor) -> Tensor:
    """Add `bias` `[P]` to the tokens `last` `[P]` where a row ends with their start.

    logits `[N, V]`, tokens `[N, L]`. starts `[P, K]` end at the right; -1 stands where a shorter
    one has none. A bias of -inf bans.
    """
    width = starts.shape[1]
    end = tokens[:, max(tokens.shape[1] - width, 0) :]
    end = torch.nn.functional.pad(end, (width - end.shape[1], 0), value=-2)
    follows = ((end[:, None] == starts) | (starts < 0)).all(2)
    added = torch.where(follows, bias.to(logits.dtype), 0.0)
    return logits.scatter_add(1, last.expand(len(logits), -1), added)


def ban(logits: Tensor, rows: Tensor, tokens: Tensor, now: Tensor) -> Tensor:
    """Ban these `tokens` in these `rows`, where `now` says so; `[C]` each, logits `[N, V]`."""
    return logits.index_put((rows, tokens), logits[rows, tokens].masked_fill(now, -torch.inf))


def keep_allowed(logits: Tensor, allowed: Tensor) -> Tensor:
    """Only what is `allowed` `[N, V]`. Where nothing of it is left, all of it at 0.

    That happens where other settings ban all that a trie or a grammar allows, which they may not.
    """
    kept = torch.where(allowed, logits, -torch.inf)
    none = kept.amax(1, keepdim=True) == -torch.inf
    return torch.where(none & allowed, 0.0, kept) if none.any() else kept


def force(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Nothing but these `tokens` `[C]` in these `rows` `[C]`, at 0. logits `[N, V]`."""
    forced = torch.full_like(logits[rows], -torch.inf).scatter_(1, tokens[:, None], 0.0)
    return logits.index_copy(0, rows, forced)


def _never(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    return logits.index_put((rows, tokens), logits.new_tensor(-torch.inf))
