"""What a config does to logits before anything is drawn, for rows that each have their own.

An edit is made once for the rows of a call, from those among them that ask for it; where none
does there is none. `N` rows, `V` tokens of the vocabulary, `C` entries.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from polyhead.generate.sampling import bans, penalties
from polyhead.generate.sampling.history import Step
from polyhead.generate.sampling.slot import Slot

Edit = Callable[[Tensor, Step], Tensor]
BreakTable = Callable[[tuple[str, ...]], Tensor]


def edits(rows: Sequence[Slot], device: torch.device, breakers: BreakTable) -> list[Edit]:
    """Those that some row asks for, in the order of transformers.

    breakers: which tokens `[V]` hold one of some strings.
    """
    found = (
        *_biases(rows, device),
        _repetition(rows, device),
        _counts(rows, device),
        *_runs(rows, device, breakers),
        *_ngrams(rows, device),
        _early(rows, device),
        _decay(rows, device),
        _begin(rows, device),
        _trie(rows, device),
        _grammar(rows, device),
        _forced(rows, device),
    )
    return [edit for edit in found if edit is not None]


class _Some:
    """Those rows of a call for which `wanted` is true."""

    def __init__(self, wanted: Iterable[object], device: torch.device) -> None:
        flags = [bool(w) for w in wanted]
        self.rows = [n for n, flag in enumerate(flags) if flag]
        self.index = torch.tensor(self.rows, dtype=torch.long, device=device)
        self.are_all = all(flags)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, x: Tensor) -> Tensor:
        return x if self.are_all else x[self.index]

    def on(self, logits: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits in which these rows are transformed."""
        if self.are_all:
            return transform(logits)
        return logits.index_copy(0, self.index, transform(logits[self.index]))

    def column(self, rows: Sequence[Slot], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        values = [getattr(rows[n].config, name) for n in self.rows]
        return torch.tensor(values, dtype=dtype, device=self.index.device)


def _repetition(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    some = _Some((row.config.repetition_penalty != 1 for row in rows), device)
    if not some:
        return None
    penalty = some.column(rows, "repetition_penalty")

    def edit(logits: Tensor, step: Step) -> Tensor:
        seen = some.of(step.tokens)
        return some.on(logits, lambda x: penalties.penalize_repetition(x, seen, penalty))

    return edit


def _counts(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    asked = (row.config.presence_penalty or row.config.frequency_penalty for row in rows)
    some = _Some(asked, device)
    if not some:
        return None
    presence = some.column(rows, "presence_penalty")
    frequency = some.column(rows, "frequency_penalty")

    def edit(logits: Tensor, step: Step) -> Tensor:
        drawn = some.of(step.drawn)
        return some.on(logits, lambda x: penalties.penalize_counts(x, drawn, presence, frequency))

    return edit


def _runs(rows: Sequence[Slot], device: torch.device, breakers: BreakTable) -> Iterable[Edit]:
    asking = [
        row.config.dry_sequence_breakers if row.config.dry_multiplier else None for row in rows
    ]
    for words in dict.fromkeys(asking):
        if words is None:
            continue
        asked = (own == words for own in asking)
        yield _runs_between(_Some(asked, device), rows, breakers(words))


def _runs_between(some: _Some, rows: Sequence[Slot], is_break: Tensor) -> Edit:
    multiplier, base = some.column(rows, "dry_multiplier"), some.column(rows, "dry_base")
    allowed = some.column(rows, "dry_allowed_length", torch.long)
    last = some.column(rows, "dry_penalty_last_n", torch.long)
    limited = bool((last >= 0).any())

    def edit(logits: Tensor, step: Step) -> Tensor:
        tokens = some.of(step.tokens)
        if limited:
            place = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
            tokens = tokens.masked_fill((place > last[:, None]) & (last >= 0)[:, None], -1)
        # The last token is looked at where nothing else is.
        breaks = is_break[tokens.clamp(min=0)] | (tokens < 0)
        return some.on(
            logits,
            lambda x: penalties.penalize_runs(x, tokens, breaks, multiplier, base, allowed),
        )

    return edit


def _ngrams(rows: Sequence[Slot], device: torch.device) -> Iterable[Edit]:
    for size in {row.config.no_repeat_ngram_size for row in rows} - {0}:
        some = _Some((row.config.no_repeat_ngram_size == size for row in rows), device)
        yield _ngrams_of(some, size)


def _ngrams_of(some: _Some, size: int) -> Edit:
    def edit(logits: Tensor, step: Step) -> Tensor:
        tokens = some.of(step.tokens)
        return some.on(logits, lambda x: bans.ban_repeated_ngrams(x, tokens, size))

    return edit


def _biases(rows: Sequence[Slot], device: torch.device) -> Iterable[Edit]:
    tables = [_bias_table(row) for row in rows]
    for table in dict.fromkeys(tables):
        if table:
            yield _bias(_Some((own == table for own in tables), device), table)


def _bias(some: _Some, table: "_BiasTable") -> Edit:
    width, device = max(len(run) for run, _ in table) - 1, some.index.device
    starts = [[-1] * (width - len(run) + 1) + list(run[:-1]) for run, _ in table]
    start = torch.tensor(starts, dtype=torch.long, device=device).view(len(table), width)
    last = torch.tensor([run[-1] for run, _ in table], device=device)
    bias = torch.tensor([value for _, value in table], device=device)

    def edit(logits: Tensor, step: Step) -> Tensor:
        # A token alone follows anything: nobody need look at what stands before.
        tokens = some.of(step.tokens) if width else start.new_empty(len(some.rows), 0)
        return some.on(logits, lambda x: bans.bias_runs(x, tokens, start, last, bias))

    return edit


_BiasTable = tuple[tuple[tuple[int, ...], float], ...]


def _bias_table(row: Slot) -> _BiasTable:
    """Every run that a row favors, or not, with what is added to its last token's logit."""
    config, never = row.config, -torch.inf
    # An end token is no bad word, whatever a file says.
    bad = (word for word in config.bad_words_ids if len(word) != 1 or word[0] not in row.ends)
    return (
        *(((token,), bias) for token, bias in config.logit_bias),
        *config.sequence_bias,
        *((word, never) for word in bad),
        *(((token,), never) for token in config.suppress_tokens),
    )


def _early(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    """No end before `min_new_tokens`."""
    entries = [
        (n, end, row.config.min_new_tokens)
        for n, row in enumerate(rows)
        for end in row.ends
        if row.config.min_new_tokens
    ]
    if not entries:
        return None
    until = max(least for _, _, least in entries)
    index, ends, least = torch.tensor(entries, device=device).unbind(1)

    def edit(logits: Tensor, step: Step) -> Tensor:
        if min(step.written) >= until:
            return logits
        return bans.ban(logits, index, ends, step.count[index] < least)

    return edit


def _decay(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    entries = [
        (n, end, *decay)
        for n, row in enumerate(rows)
        if (decay := row.config.exponential_decay_length_penalty) is not None
        for end in row.ends
    ]
    if not entries:
        return None
    index, ends, start = torch.tensor([e[:3] for e in entries], device=device).unbind(1)
    factor = torch.tensor([e[3] for e in entries], device=device)

    def edit(logits: Tensor, step: Step) -> Tensor:
        return penalties.favor_ends(logits, index, ends, step.count[index] - start, factor)

    return edit


def _begin(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    """Some tokens do not come first, or first after those that are forced."""
    entries = [
        (n, token, len(row.config.forced_ids))
        for n, row in enumerate(rows)
        for token in row.config.begin_suppress_tokens
    ]
    if not entries:
        return None
    index, tokens, start = torch.tensor(entries, device=device).unbind(1)

    def edit(logits: Tensor, step: Step) -> Tensor:
        return bans.ban(logits, index, tokens, step.count[index] == start)

    return edit


def _trie(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    asked = [n for n, row in enumerate(rows) if row.config.trie is not None]
    if not asked:
        return None
    some = _Some((row.config.trie is not None for row in rows), device)
    tries = {id(rows[n].config.trie): rows[n].config.trie for n in asked}

    def edit(logits: Tensor, step: Step) -> Tensor:
        mask = torch.ones(len(asked), logits.shape[1], dtype=torch.bool)
        for key, trie in tries.items():
            own = [i for i, n in enumerate(asked) if id(step.rows[n].config.trie) == key]
            nodes = [step.rows[asked[i]].node(step.written[asked[i]]) for i in own]
            ends = [step.rows[asked[i]].ends for i in own]
            mask[own] = trie.allowed(nodes, ends, logits.shape[1])
        return some.on(logits, lambda x: bans.keep_allowed(x, mask.to(device)))

    return edit


def _grammar(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    some = _Some((row.walk is not None for row in rows), device)
    if not some:
        return None

    def edit(logits: Tensor, step: Step) -> Tensor:
        mask = np.ones((len(some.rows), logits.shape[1]), bool)
        for allowed, n in zip(mask, some.rows, strict=True):
            _allow(step.rows[n], step.written[n], allowed)
        return some.on(logits, lambda x: bans.keep_allowed(x, torch.from_numpy(mask).to(device)))

    return edit


def _allow(row: Slot, written: int, allowed: np.ndarray) -> None:
    """Put into `allowed` `[V]` what a row's grammar allows after so many tokens."""
    assert row.walk is not None
    options = row.walk.options(row.free(written))
    if options is not None:
        allowed[:] = options.allowed(len(allowed))
        allowed[list(row.ends)] = options.may_end
    elif problem := row.walk.problem:
        row.problem = f"the grammar cannot be followed any further: {problem}"
        allowed[:] = False


def _forced(rows: Sequence[Slot], device: torch.device) -> Edit | None:
    if not any(r.config.forced_ids or r.config.forced_eos_token_id is not None for r in rows):
        return None

    def edit(logits: Tensor, step: Step) -> Tensor:
        pairs = zip(step.rows, step.written, strict=True)
        forced = [(n, t) for n, (r, w) in enumerate(pairs) if (t := r.forced(w)) is not None]
        if not forced:
            return logits
        index, tokens = torch.tensor(forced, device=device).unbind(1)
        return bans.force(logits, index, tokens)

    return edit
