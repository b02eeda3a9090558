"""Masked language modelling: what is hidden, the rows, the loss. B batch, T tokens, V vocabulary.

(Devlin et al. 2019; whole words after Google's later BERT; spans after Joshi et al. 2020.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.nn.head import Heads, LanguageHead, MaskedLanguageHead
from polyhead.train.config import TrainConfig
from polyhead.train.data import Split, Windows, windows
from polyhead.train.objectives import (
    CHUNK_LOGITS,
    IGNORE,
    LanguageBatch,
    Loss,
    head_cross_entropy,
)
from polyhead.train.sources import Source
from polyhead.train.tokens import Progress
from polyhead.train.words import Words, words_of

Choice = Literal["token", "word", "span"]
CHOICES: tuple[Choice, ...] = ("token", "word", "span")
SPAN_P = 0.2  # of the geometric distribution of a span's words; 3.8 words on average up to 10


@dataclass(frozen=True, eq=False)
class Masking:
    """Which tokens of a row are to be predicted, and what stands in their place.

    choice:   single tokens, whole words, or spans of whole words (the last cut at the budget).
    ratio:    of the row's tokens that are predicted, special ones aside: those never are.
    mask, random: the shares that become the mask token and a token drawn from the vocabulary; the
              rest stays. Decided for each token, and for a span as one.
    max_span: words of a span at most.
    """

    mask_id: int
    special: np.ndarray
    """Whether an id is a special token, bool [V]."""
    words: Words | None
    choice: Choice = "token"
    ratio: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    max_span: int = 10

    @classmethod
    def of(cls, tokenizer: Any, choice: Choice = "token", **settings: Any) -> Self:
        """The masking of a tokenizer; ConfigError without a mask token or for a bad setting."""
        if tokenizer.mask_id is None:
            raise ConfigError(
                "the tokenizer has no mask token: train one with special_tokens={'mask': '[MASK]'}"
            )
        special = np.zeros(tokenizer.vocab_size, bool)
        special[list(tokenizer.special_ids)] = True
        words = None if choice == "token" else words_of(tokenizer)
        return cls(tokenizer.mask_id, special, words, choice, **settings)

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ConfigError(f"choice is {self.choice!r}: choose one of {', '.join(CHOICES)}")
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio is {self.ratio}: a share between 0 and 1 is hidden")
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1:
            raise ConfigError(
                f"mask and random are {self.mask} and {self.random}: shares of at most 1 together"
            )
        if self.max_span < 1:
            raise ConfigError(f"max_span is {self.max_span}: a span has at least 1 word")

    def __str__(self) -> str:
        shown = (self.choice, self.ratio, self.mask, self.random, self.max_span)
        return f"masking {' '.join(map(str, shown))}"

    def __call__(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A row [T] with tokens hidden, and its labels [T], IGNORE where none is predicted."""
        at, group = self.choose(ids, draw)
        labels = np.full_like(ids, IGNORE)
        labels[at] = ids[at]
        hidden = ids.copy()
        fate = draw.random(group.max(initial=-1) + 1)[group]
        any_token = self._drawable[draw.integers(len(self._drawable), size=len(at))]
        hidden[at] = np.where(
            fate < self.mask,
            self.mask_id,
            np.where(fate < self.mask + self.random, any_token, ids[at]),
        )
        return hidden, labels

    def choose(self, ids: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions to predict [N], and for each the group that shares one fate [N].

        Of a row with anything to predict, at least one token or word.
        """
        ordinary = ~self.special[ids]
        count = int(ordinary.sum())
        budget = min(count, max(1, round(self.ratio * count)))
        if self.choice == "token" or count == 0:
            at = draw.permutation(np.flatnonzero(ordinary))[:budget]
            return at, np.arange(len(at))
        assert self.words is not None
        starts = self.words.starts(ids)
        first = np.flatnonzero(starts & ordinary)
        # A word ends where the next begins; a special token begins one, too.
        edges = np.flatnonzero(starts)
        after = np.append(edges, len(ids))[np.searchsorted(edges, first, side="right")]
        if self.choice == "word":
            at = _fill(first, after, budget, draw)
            return at, np.arange(len(at))
        return _spans(first, after, budget, self.max_span, draw)

    @cached_property
    def _drawable(self) -> np.ndarray:
        return np.flatnonzero(~self.special)


def _fill(
    first: np.ndarray, after: np.ndarray, budget: int, draw: np.random.Generator
) -> np.ndarray:
    """Positions of whole words in random order, each that still fits; else of the shortest."""
    sizes = after - first
    chosen: list[np.ndarray] = []
    left = max(budget, int(sizes.min()))
    for word in draw.permutation(len(first)).tolist():
        if sizes[word] <= left:
            chosen.append(np.arange(int(first[word]), int(after[word])))
            left -= int(sizes[word])
        if left == 0:
            break
    return np.concatenate(chosen)


def span_lengths(count: int, longest: int, draw: np.random.Generator) -> np.ndarray:
    """Words of `count` spans: geometric, p = 0.2, given that they are at most `longest`."""
    chance = SPAN_P * (1 - SPAN_P) ** np.arange(longest)
    return 1 + np.searchsorted(np.cumsum(chance / chance.sum())[:-1], draw.random(count), "right")


def _spans(
    first: np.ndarray, after: np.ndarray, budget: int, longest: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in spans of words that begin anywhere, until the budget is spent."""
    free = np.ones(len(first), bool)
    at: list[int] = []
    group: list[int] = []
    lengths = span_lengths(budget, longest, draw).tolist()
    for number, length in enumerate(lengths):
        begin = int(draw.choice(np.flatnonzero(free)))
        for word in range(begin, min(begin + length, len(first))):
            # What is taken already, and a special token between two words, end the span.
            if not free[word] or (word > begin and first[word] != after[word - 1]):
                break
            free[word] = False
            at += range(int(first[word]), int(after[word]))
            group += [number] * int(after[word] - first[word])
        if len(at) >= budget:
            break
    return np.asarray(at[:budget]), np.asarray(group[:budget])


@dataclass(frozen=True)
class Frame:
    """What stands around the text of a row: the classification and the separating token."""

    cls: int | None
    sep: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """A tokenizer's frame, as far as it has one."""
        return cls(tokenizer.cls_id, tokenizer.sep_id)

    @property
    def size(self) -> int:
        """Tokens it takes of a row."""
        return (self.cls is not None) + (self.sep is not None)

    def around(self, body: np.ndarray) -> np.ndarray:
        """Rows [B, T] in their frame, int64."""
        before, after = ([[t]] * len(body) if t is not None else None for t in (self.cls, self.sep))
        parts = [np.asarray(p, np.int64) for p in (before, body, after) if p is not None]
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True, eq=False)
class MaskedWindows:
    """Windows in their frame, masked. Row n's masks are a function of (seed, n) alone.

    So each epoch has its own, and the first batches, which validation reads, always the same.
    """

    windows: Windows
    masking: Masking
    frame: Frame

    @property
    def digest(self) -> str:
        """The corpus, its tokenizer and the masking."""
        return f"{self.windows.digest} {self.masking}"

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, index: int, batch_size: int) -> LanguageBatch:
        """The index-th batch of the run; labels count where a token is to be predicted."""
        rows = self.rows(index, batch_size)
        first, seed = index * batch_size, self.windows.seed
        pairs = [self.masking(row, drawn(seed, first + n)) for n, row in enumerate(rows)]
        hidden, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return LanguageBatch(hidden, labels)

    def rows(self, index: int, batch_size: int) -> np.ndarray:
        """The same rows unmasked, int64 [B, T]."""
        starts = self.windows.starts(index * batch_size, batch_size)
        body = self.windows.tokens.ids[starts[:, None] + np.arange(self.windows.context)]
        return self.frame.around(body)


def drawn(seed: int, row: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one row of the run; each use of them has a stream of its own."""
    return np.random.default_rng((seed, row, stream))


def masked_windows(
    source: Source,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    progress: Progress | None = None,
    **settings: Any,
) -> MaskedWindows | None:
    """Rows of `config.context` tokens; settings are Masking's. None where no row can be held out.

    The body of a row is a stretch of the corpus whatever documents it crosses, as RoBERTa's.
    """
    masking, frame = Masking.of(tokenizer, **settings), Frame.of(tokenizer)
    found = framed(frame.size, source, tokenizer, model, config, split, progress)
    return None if found is None else MaskedWindows(found, masking, frame)


def framed(
    frame: int,
    source: Source,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    progress: Progress | None,
) -> Windows | None:
    """Windows that leave a row of `config.context` tokens room for a frame."""
    limit = model.config.max_tokens
    if limit is not None and config.context > limit:
        raise ConfigError(
            f"context is {config.context}, and the model takes {limit} tokens: set context to "
            "that or less"
        )
    if config.context <= frame:
        raise ConfigError(
            f"context is {config.context}, and {frame} of a row are special: set it above that"
        )
    inner = replace(config, context=config.context - frame)
    return windows(source, tokenizer, model, inner, split, progress)


def masked_lm(model: Any, batch: LanguageBatch) -> Loss:
    """Cross-entropy of the hidden tokens; the head sees their positions alone."""
    name = "lm" if isinstance(model.head, Heads) else None
    hidden = model.hidden(batch.input_ids, head=name, **extras(batch))
    return masked_loss(model, hidden, batch)


def extras(batch: Any) -> dict[str, Any]:
    """What a backbone takes beside the ids, as far as the batch has it."""
    names = ("attention_mask", "token_type_ids", "position_ids")
    found = {name: getattr(batch, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def masked_loss(model: Any, hidden: Tensor, batch: LanguageBatch) -> Loss:
    """The masked language model's loss of the states `[B, T, E]` that its head reads."""
    rows = batch.labels != IGNORE
    labels = batch.labels[rows]
    decoder, states = before_vocabulary(model, hidden, rows)
    nll = head_cross_entropy(decoder, states, labels)
    answers = () if model.training else (hits(decoder, states.detach(), labels),)
    return Loss(nll, len(labels), {"loss": nll.detach()}, answers, lambda: decoder(states))


def before_vocabulary(model: Any, hidden: Tensor, rows: Tensor) -> tuple[Any, Tensor]:
    """The last product of a model's language head, and what it reads at some tokens [N, E].

    rows: which tokens, bool [B, T].
    """
    top = model.head.pick("lm") if isinstance(model.head, Heads) else model.head
    if isinstance(top, MaskedLanguageHead):
        return top.decoder, top.transform(hidden[rows])
    if isinstance(top, LanguageHead):
        return top, hidden[rows]
    raise ConfigError(
        f"the model's head ({type(top).__name__}) predicts no masked tokens: load it with head='lm'"
    )


@torch.no_grad()
def hits(decoder: Any, states: Tensor, labels: Tensor) -> Tensor:
    """Whether the likeliest token is the right one, bool [N]; few logits are held at once."""
    size = max(1, CHUNK_LOGITS // decoder.weight.shape[0])
    parts = zip(states.split(size), labels.split(size), strict=True)
    found = [decoder(state).argmax(-1) == label for state, label in parts]
    return torch.cat(found) if found else labels.bool()


def hit_rate(
    model: Any, dataset: Any, answers: Sequence[tuple[Tensor, ...]]
) -> Mapping[str, float]:
    """The share of the predicted tokens that are right."""
    hits = torch.cat([answer[0] for answer in answers])
    return {"accuracy": float(hits.float().mean()) if len(hits) else 0.0}
