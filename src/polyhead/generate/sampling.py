"""Logits -> transforms -> draw. `B` rows, `V` tokens of the vocabulary, `L` tokens so far.

Every transform takes one parameter a row, returns new logits and leaves the caller's as they were.
Removed tokens get -inf.
"""

import hashlib
import secrets
from array import array
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig

_SHORTLIST = 128
_DRAWS_AHEAD = 64
_BLOCK = 256
_ROUNDING = 5e-7  # of a probability that comes from float32 logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the tokens `seen` `[B, L]` less likely: positive logits / penalty, negative × penalty.

    logits `[B, V]`, penalty `[B]`. A token seen twice is penalized once (Keskar et al. 2019).
    """
    score = logits.gather(1, seen)
    penalty = penalty[:, None]
    score = torch.where(score < 0, score * penalty, score / penalty)
    return logits.scatter(1, seen, score)


def penalize_counts(logits: Tensor, drawn: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """logit - count × frequency - (count > 0) × presence, as OpenAI documents.

    logits `[B, V]`; drawn `[B, L]` the generated tokens; presence, frequency `[B]`.
    """
    ones = torch.ones_like(drawn, dtype=logits.dtype)
    count = torch.zeros_like(logits).scatter_add_(1, drawn, ones).gather(1, drawn)
    score = logits.gather(1, drawn) - count * frequency[:, None] - presence[:, None]
    return logits.scatter(1, drawn, score)


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keep the `k` `[B]` largest logits of a row, and what ties with the last of them; 0 keeps all.

    logits `[B, V]`.
    """
    k = k.clamp(max=logits.shape[1])
    largest = logits.topk(int(k.max()), dim=1).values if k.any() else logits[:, :1]
    last = largest.gather(1, (k - 1).clamp(min=0)[:, None])
    return logits.masked_fill((logits < last) & (k > 0)[:, None], -torch.inf)


def keep_top_p(logits: Tensor, p: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Keep the fewest most likely tokens that reach probability `p` `[B]` together; 1 keeps all.

    logits `[B, V]`. Where they are only the largest logits of a row, log_total `[B, 1]` is the
    log-sum-exp of all of them. The token that crosses p stays; of equal ones, the first.
    """
    if log_total is None:
        log_total = _log_total(logits)
    descending, order = logits.sort(dim=1, descending=True, stable=True)
    likely = (descending - log_total).exp()
    before = likely.cumsum(1) - likely
    remove = (before > p[:, None] - _ROUNDING) & (p < 1)[:, None]
    remove[:, 0] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter_(1, order, remove), -torch.inf)


def keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep tokens at least `p` `[B]` times as likely as the most likely one. logits `[B, V]`."""
    likely = logits.softmax(1)
    best = likely.amax(1, keepdim=True)
    # The best itself stays even where p × best is rounded up.
    remove = (likely < p[:, None] * best) & (likely < best)
    return logits.masked_fill(remove, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One index a row `[B]` with the probabilities softmax(logits `[B, V]`).

    uniform `[B]` in [0, 1) picks it: the first index whose cumulative probability exceeds it.
    """
    likely = logits.softmax(1, dtype=torch.float32)
    if likely.shape[1] <= 2 * _BLOCK:
        return _first_above(likely, uniform)[0]
    # First the block of tokens, then the token in it: exact sums, but of few numbers.
    vocab, even = likely.shape[1], likely.shape[1] // _BLOCK * _BLOCK
    blocks = likely[:, :even].unflatten(1, (-1, _BLOCK)).sum(2)
    blocks = torch.cat([blocks, likely[:, even:].sum(1, keepdim=True)], dim=1)
    block, rest = _first_above(blocks, uniform)
    inside = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=likely.device)
    some = likely.gather(1, inside.clamp(max=vocab - 1)).masked_fill(inside >= vocab, 0)
    return (block * _BLOCK + _first_above(some, rest)[0]).clamp(max=vocab - 1)


def _first_above(likely: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first index `[B]` whose cumulative sum of likely `[B, N]` exceeds uniform × the total.

    Also where, as a share `[B]` of that entry, the point lies.
    """
    cumulative = likely.cumsum(1, dtype=_exact(likely.device))
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.to(total)[:, None] * total, total.nextafter(total * 0))
    index = torch.searchsorted(cumulative, target, right=True)
    index = index.clamp(max=likely.shape[1] - 1)  # what is not a number is past the end
    own = likely.gather(1, index).to(total)
    share = (target - cumulative.gather(1, index) + own) / own
    return index[:, 0], share.clamp(0, 1)[:, 0]


def _log_total(logits: Tensor) -> Tensor:
    """Log-sum-exp `[B, 1]` of logits `[B, V]`, from softmax, which is the faster kernel."""
    best = logits.amax(1, keepdim=True)
    likeliest = logits.softmax(1, dtype=torch.float32).amax(1, keepdim=True)
    return best.to(_exact(logits.device)) - likeliest.to(_exact(logits.device)).log()


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class Sampler:
    """Draws the next token of every row, each row by its own config.

    prompts and seeds, one a row; `ends` the tokens that may not come before `min_new_tokens`;
    `steps` how often it will be called at most.
    Remembers what was drawn, for the penalties, and where each row's random numbers stand.
    """

    def __init__(
        self,
        configs: Sequence[GenerationConfig],
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        ends: Sequence[Collection[int]],
        steps: int,
        device: torch.device,
    ) -> None:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(c, name) for c in configs], dtype=dtype, device=device)

        def rows(wanted: list[bool]) -> Tensor:
            return torch.tensor(wanted, device=device).nonzero()[:, 0]

        self.drawn = 0
        self.temperature = column("temperature", torch.float32)
        self.filters = _Filters(*(column(n, t) for n, t in _FILTERS.items()))
        self.penalties = tuple(column(n, torch.float32) for n in _PENALTIES)
        self.repeats = any(c.repetition_penalty != 1 for c in configs)
        self.counts = any(c.presence_penalty or c.frequency_penalty for c in configs)
        narrow = [bool(c.top_k or c.min_p) or c.top_p < 1 for c in configs]
        pairs = list(zip(configs, narrow, strict=True))
        self.greedy = rows([c.greedy for c in configs])
        self.whole = rows([not c.greedy and not few for c, few in pairs])
        self.narrow = rows([not c.greedy and few for c, few in pairs])
        self.widths = _widths([c.top_k for c, few in pairs if few and not c.greedy])
        self.early = _Early(configs, ends, device)
        if len(self.greedy) < len(configs):
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.repeats or self.counts:
            self.prompt_width = max(map(len, prompts))
            self.history = _history(prompts, self.prompt_width + steps, device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Ids `[B]` drawn from logits `[B, V]`; -1 where a row's logits are not numbers."""
        scores = self._penalized(logits.float())
        best = scores.amax(1)
        ids = scores.argmax(1) if len(self.greedy) else best.new_zeros(best.shape, dtype=torch.long)
        if len(self.greedy) < len(ids):
            self._draw(scores, ids)
        if self.repeats or self.counts:
            self.history[:, self.prompt_width + self.drawn] = ids
        self.drawn += 1
        return ids.masked_fill_(~best.isfinite(), -1)

    def _penalized(self, scores: Tensor) -> Tensor:
        repetition, presence, frequency = self.penalties
        if self.repeats:
            so_far = self.history[:, : self.prompt_width + self.drawn]
            scores = penalize_repetition(scores, so_far, repetition)
        if self.counts:
            so_far = self.history[:, self.prompt_width : self.prompt_width + self.drawn]
            scores = penalize_counts(scores, so_far, presence, frequency)
        return self.early(scores, self.drawn)

    def _draw(self, scores: Tensor, ids: Tensor) -> None:
        """Put what the rows that draw have drawn into ids `[B]`."""
        uniform = self._uniform().to(ids.device)
        if len(self.whole):
            some = _pick(scores, self.whole) / _pick(self.temperature, self.whole)[:, None]
            ids[self.whole] = draw(some, _pick(uniform, self.whole))
        if len(self.narrow):
            ids[self.narrow] = self._draw_narrow(scores, uniform)

    def _draw_narrow(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """Draw after top-k, top-p and min-p, without sorting the vocabulary where a few suffice.

        A shortlist of the largest logits suffices when the filters remove its last entry: what is
        not on it would be removed as well. Rows whose shortlist was too short try a longer one.
        Tokens stand in the order of their ids, so that the length of the list changes no draw.
        """
        chosen = torch.zeros_like(uniform, dtype=torch.long)
        rows, vocab = self.narrow, scores.shape[1]
        for width in (*self.widths, vocab):
            some, temperature = _pick(scores, rows), _pick(self.temperature, rows)[:, None]
            total = _log_total(some / temperature) if self.filters.need_total else None
            if width * 4 > vocab:
                kept = self.filters(some / temperature, rows, total)
                chosen[rows] = draw(kept, _pick(uniform, rows))
                break
            largest, ids = some.topk(width, dim=1)
            ids, order = ids.sort(dim=1)
            largest = largest / temperature
            kept = self.filters(largest.gather(1, order), rows, total)
            chosen[rows] = ids.gather(1, draw(kept, _pick(uniform, rows))[:, None])[:, 0]
            last = kept.masked_fill(kept == -torch.inf, torch.inf).amin(1)
            rows = rows[last <= largest[:, -1]]
            if not len(rows):
                break
        return chosen[self.narrow]

    def _uniform(self) -> Tensor:
        column = self.drawn % _DRAWS_AHEAD
        if column == 0:
            ahead = [
                torch.rand(_DRAWS_AHEAD, generator=g, dtype=torch.float64) for g in self.generators
            ]
            self.ahead = torch.stack(ahead)
        return self.ahead[:, column]


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_FILTERS = {"top_k": torch.long, "top_p": torch.float32, "min_p": torch.float32}


class _Filters:
    """Top-k, then top-p, then min-p; only those that some row asks for."""

    def __init__(self, k: Tensor, p: Tensor, min_p: Tensor) -> None:
        self.k, self.p, self.min_p = k, p, min_p
        self.by_k, self.by_p = bool((k > 0).any()), bool((p < 1).any())
        self.by_min_p = bool((min_p > 0).any())
        self.need_total = bool(((p < 1) & (k == 0)).any())

    def __call__(self, logits: Tensor, rows: Tensor, log_total: Tensor | None = None) -> Tensor:
        """logits `[b, N]` of `rows` `[b]`; log_total `[b, 1]` where they are the largest N only."""
        k = _pick(self.k, rows)
        if self.by_k:
            logits = keep_top_k(logits, k)
        if self.by_p:
            if log_total is not None and self.by_k:
                log_total = torch.where((k > 0)[:, None], _log_total(logits), log_total)
            logits = keep_top_p(logits, _pick(self.p, rows), log_total)
        if self.by_min_p:
            logits = keep_min_p(logits, _pick(self.min_p, rows))
        return logits


class _Early:
    """Forbids the end tokens of rows that have not reached their `min_new_tokens`."""

    def __init__(
        self,
        configs: Sequence[GenerationConfig],
        ends: Sequence[Collection[int]],
        device: torch.device,
    ) -> None:
        least = [c.min_new_tokens for c in configs]
        entries = [(least[row], row, end) for row, some in enumerate(ends) for end in some]
        table = torch.tensor([e for e in entries if e[0]], dtype=torch.long, device=device)
        self.least, self.rows, self.ends = table.reshape(-1, 3).unbind(1)
        self.until = max(least)

    def __call__(self, logits: Tensor, drawn: int) -> Tensor:
        if drawn >= self.until:
            return logits
        now = self.least > drawn
        forbidden = torch.tensor(-torch.inf, dtype=logits.dtype, device=logits.device)
        return logits.index_put((self.rows[now], self.ends[now]), forbidden)


def _widths(top_ks: Sequence[int]) -> tuple[int, ...]:
    """Lengths of shortlists to try, shortest first."""
    if not top_ks:
        return ()
    # A few more than k, since ties with the k-th stay too.
    first = _SHORTLIST if min(top_ks) == 0 else 0
    first = max(first, max(top_ks) + 32)
    return first, first * 8, first * 32


def _history(prompts: Sequence[Sequence[int]], length: int, device: torch.device) -> Tensor:
    """Ids `[B, length]`: the prompt, then its first token again, which changes no penalty."""
    padded = [list(p) + [p[0]] * (length - len(p)) for p in prompts]
    return torch.tensor(padded, device=device)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without a copy where that is all of them in order."""
    return x if len(rows) == len(x) else x[rows]


def row_seeds(
    configs: Sequence[GenerationConfig], prompts: Sequence[Sequence[int]], shared: bool
) -> list[int]:
    """One seed a row, from its config's seed and its prompt alone.

    Where one config is `shared` by all rows, equal prompts also count which of them it is, so that
    asking for one prompt several times gives several texts.
    """
    times: dict[bytes, int] = {}
    seeds: list[int] = []
    for config, prompt in zip(configs, prompts, strict=True):
        if config.seed is None:
            seeds.append(secrets.randbits(63))
            continue
        key = str(config.seed).encode() + b":" + array("q", prompt).tobytes()
        time = times.get(key, 0) if shared else 0
        times[key] = time + 1
        digest = hashlib.blake2b(key, digest_size=8, salt=time.to_bytes(16)).digest()
        seeds.append(int.from_bytes(digest) >> 1)
    return seeds
