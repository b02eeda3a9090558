"""Which token each row takes: the best one, or one that is drawn. `N` rows, `V` tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling import filters, mirostat
from polyhead.generate.sampling.draw import draw, likeliest, log_total

_SHORTLIST = 128


class Choice:
    """Made once for the rows of a call; only what some row asks for is computed."""

    def __init__(self, configs: Sequence[GenerationConfig], device: torch.device) -> None:
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(c, name) for c in configs], dtype=dtype, device=device)

        kinds = [_kind(config) for config in configs]
        self.rows = {
            kind: torch.tensor([k == kind for k in kinds], device=device).nonzero()[:, 0]
            for kind in set(kinds)
        }
        self.is_greedy = set(kinds) == {"greedy"}
        if self.is_greedy:
            return
        self.drawing = [n for n, kind in enumerate(kinds) if kind != "greedy"]
        self.temperature = column("temperature")
        self.is_scaled = any(c.temperature != 1 for c in configs)
        self.filters = _Filters(configs, device)
        self.mirostat = column("mirostat", torch.long)
        some = [c.top_k for c, kind in zip(configs, kinds, strict=True) if kind == "short"]
        self.widths = _widths(some)

    def __call__(
        self, scores: Tensor, uniform: Tensor | None = None, mu: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Ids `[N]` from scores `[N, V]`, -1 where these are not numbers, and surprises `[N]`.

        uniform `[N]` in [0, 1), unless all rows are greedy. mu `[N]` where some row has mirostat;
        only then are there surprises, of those rows.
        """
        ids = likeliest(scores)
        # The largest is what is not a number, where there is such a thing.
        known = scores.gather(1, ids[:, None])[:, 0].isfinite()
        surprises = None
        for kind, rows in self.rows.items():
            if kind == "greedy":
                continue
            assert uniform is not None
            if kind == "short":
                ids[rows] = self._draw_short(scores, rows, uniform)
                continue
            some = self._scaled(scores, rows)
            if kind == "filtered":
                some = self.filters.untypical(self.filters(some, rows), rows)
            elif kind == "mirostat":
                assert mu is not None
                some = self._unsurprising(some, rows, mu[rows])
            ids[rows] = draw(some, _pick(uniform, rows))
            if kind == "mirostat":
                surprises = scores.new_zeros(len(scores), dtype=torch.float32)
                surprises[rows] = mirostat.surprise(some, ids[rows])
        return ids.masked_fill_(~known, -1), surprises

    def _scaled(self, scores: Tensor, rows: Tensor) -> Tensor:
        some = _pick(scores, rows)
        return some / _pick(self.temperature, rows)[:, None] if self.is_scaled else some

    def _unsurprising(self, logits: Tensor, rows: Tensor, mu: Tensor) -> Tensor:
        first = self.mirostat[rows] == 1
        kept = mirostat.keep_unsurprising(logits, mu)
        if first.any():
            kept = torch.where(first[:, None], mirostat.keep_zipf(logits, mu), kept)
        return kept

    def _draw_short(self, scores: Tensor, rows: Tensor, uniform: Tensor) -> Tensor:
        """Draw after top-k, top-p and min-p, without sorting the vocabulary where a few suffice.

        A shortlist of the largest logits suffices when the filters remove its last entry: what is
        not on it would be removed as well. Rows whose shortlist was too short filter all tokens.
        Tokens stand in the order of their ids, so that the length of the list changes no draw.
        """
        chosen = torch.zeros_like(uniform, dtype=torch.long)
        asked, vocab = rows, scores.shape[1]
        for width in (*self.widths, vocab):
            some = self._scaled(scores, rows)
            total = log_total(some) if self.filters.need_total else None
            if width * 4 > vocab:
                kept = self.filters(some, rows, total)
                chosen[rows] = draw(kept, _pick(uniform, rows))
                break
            largest, ids = some.topk(width, dim=1)
            ids, order = ids.sort(dim=1)
            kept = self.filters(largest.gather(1, order), rows, total)
            chosen[rows] = ids.gather(1, draw(kept, _pick(uniform, rows))[:, None])[:, 0]
            last = kept.masked_fill(kept == -torch.inf, torch.inf).amin(1)
            rows = rows[last <= largest[:, -1]]
            if not len(rows):
                break
        return chosen[asked]


class _Filters:
    """In the order of transformers; only those that some row asks for."""

    def __init__(self, configs: Sequence[GenerationConfig], device: torch.device) -> None:
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(c, name) for c in configs], dtype=dtype, device=device)

        self.k, self.p, self.min_p = column("top_k", torch.long), column("top_p"), column("min_p")
        self.by_k = any(c.top_k for c in configs)
        self.by_p = any(c.top_p < 1 for c in configs)
        self.by_min_p = any(c.min_p for c in configs)
        self.need_total = any(c.top_p < 1 and c.top_k == 0 for c in configs)
        rest = (
            (filters.keep_typical, "typical_p", 1),
            (filters.keep_epsilon, "epsilon_cutoff", 0),
            (filters.keep_eta, "eta_cutoff", 0),
        )
        self.rest = [
            (keep, column(name))
            for keep, name, neutral in rest
            if any(getattr(c, name) != neutral for c in configs)
        ]

    def __call__(self, logits: Tensor, rows: Tensor, log_total_: Tensor | None = None) -> Tensor:
        """logits `[n, C]` of `rows` `[n]`; log_total_ `[n, 1]` where C are the largest."""
        k = _pick(self.k, rows)
        if self.by_k:
            logits = filters.keep_top_k(logits, k)
        if self.by_p:
            if log_total_ is not None and self.by_k:
                log_total_ = torch.where((k > 0)[:, None], log_total(logits), log_total_)
            logits = filters.keep_top_p(logits, _pick(self.p, rows), log_total_)
        if self.by_min_p:
            logits = filters.keep_min_p(logits, _pick(self.min_p, rows))
        return logits

    def untypical(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Those that look at the whole distribution: logits `[n, V]` of `rows` `[n]`."""
        for keep, value in self.rest:
            logits = keep(logits, _pick(value, rows))
        return logits


def _kind(config: GenerationConfig) -> str:
    """How a row's token is found: "short" where the likeliest tokens are enough to filter."""
    if config.greedy:
        return "greedy"
    if config.mirostat:
        return "mirostat"
    if config.typical_p < 1 or config.epsilon_cutoff or config.eta_cutoff:
        return "filtered"
    return "short" if config.top_k or config.min_p or config.top_p < 1 else "whole"


def _widths(top_ks: Sequence[int]) -> tuple[int, ...]:
    """Lengths of shortlists to try: a longer one would cost more than all tokens do."""
    if not top_ks:
        return ()
    # A few more than k, since ties with the k-th stay too.
    first = _SHORTLIST if min(top_ks) == 0 else 0
    return (max(first, max(top_ks) + 32),)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without a copy where that is all of them in order."""
    return x if len(rows) == len(x) else x[rows]
