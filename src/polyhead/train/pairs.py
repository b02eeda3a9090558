"""Next sentence and sentence order: two segments, and how they belong together.

Next sentence (Devlin et al. 2019): label 0 where the second follows the first, 1 where it is of
another document. Sentence order (Lan et al. 2020): label 0 in order, 1 where they are swapped.
Segments are stretches of tokens of one document, as documents are not cut into sentences here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError, DataError
from polyhead.nn.head import Heads
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.masked import Masking, drawn, extras, framed, masked_loss
from polyhead.train.objectives import IGNORE, LanguageBatch, Loss
from polyhead.train.sources import Source
from polyhead.train.tokens import Progress, Tokens

Kind = Literal["nsp", "sop"]
FRAME = 3  # [CLS] a [SEP] b [SEP]
LEAST = 8  # tokens of a stretch; what is shorter says little of order


@dataclass(frozen=True, kw_only=True)
class PairBatch(LanguageBatch):
    """Pairs `[CLS] a [SEP] b [SEP]` padded on the right, `pair_labels` [B], and masked `labels`.

    Where tokens are masked they are what is counted, and `pair_weight` of them stand for a pair,
    so that both losses are means, and yet sums over what a step counts.
    """

    token_type_ids: Tensor
    pair_labels: Tensor
    pair_weight: float = 1.0
    is_masked: bool = False

    def tokens(self) -> int:
        """Masked tokens; without any, pairs."""
        return super().tokens() if self.is_masked else len(self.pair_labels)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Stretches of documents cut in two; each once an epoch, row n a function of (seed, n) alone.

    first, size, owner: where each stretch begins, its tokens, and its document.
    """

    tokens: Tokens
    first: np.ndarray
    size: np.ndarray
    owner: np.ndarray
    kind: Kind
    room: int
    seed: int
    frame: tuple[int, int, int]
    """Ids of the classification, the separating and the padding token."""
    masking: Masking | None

    @property
    def digest(self) -> str:
        """The corpus, its tokenizer and what is asked."""
        return f"{self.tokens.digest} {self.kind} {self.room} {self.masking or ''}"

    def __len__(self) -> int:
        return len(self.first)

    def batch(self, index: int, batch_size: int) -> PairBatch:
        """The index-th batch of the run."""
        begin = index * batch_size
        order = Examples(range(len(self)), list, self.seed, self.digest).order(begin, batch_size)
        cls, sep, pad = self.frame
        ids = np.full((batch_size, self.room + FRAME), pad)
        types, keep, labels = np.zeros_like(ids), np.zeros_like(ids), np.full_like(ids, IGNORE)
        answers = np.zeros(batch_size, np.int64)
        for row, stretch in enumerate(order.tolist()):
            draw = drawn(self.seed, begin + row)
            a, b, answers[row] = self.pair(stretch, draw)
            pair = np.concatenate([[cls], a, [sep], b, [sep]])
            size = len(pair)
            keep[row, :size] = 1
            types[row, len(a) + 2 : size] = 1
            if self.masking is None:
                ids[row, :size] = pair
            else:
                ids[row, :size], labels[row, :size] = self.masking(pair, draw)
        widest = int(keep.sum(1).max())
        ids, labels, keep, types = (
            torch.from_numpy(part[:, :widest].copy()) for part in (ids, labels, keep, types)
        )
        return PairBatch(
            ids, labels, keep,
            token_type_ids=types,
            pair_labels=torch.from_numpy(answers),
            pair_weight=1.0 if self.masking is None else self.masking.ratio * self.room,
            is_masked=self.masking is not None,
        )  # fmt: skip

    def pair(self, stretch: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Two segments and their label. Each has at least a quarter of the stretch."""
        size = int(self.size[stretch])
        cut = int(draw.integers(size // 4, size - size // 4 + 1))
        text = self._text(stretch)
        a, b = text[:cut], text[cut:]
        if draw.random() < 0.5:
            return a, b, 0
        if self.kind == "sop":
            return b, a, 1
        other = self._elsewhere(stretch, draw)
        start = int(draw.integers(max(1, len(other) - len(b) + 1)))
        return a, other[start : start + len(b)], 1

    def _text(self, stretch: int) -> np.ndarray:
        first = int(self.first[stretch])
        return np.asarray(self.tokens.ids[first : first + int(self.size[stretch])], np.int64)

    def _elsewhere(self, stretch: int, draw: np.random.Generator) -> np.ndarray:
        """A stretch of another document; documents lie side by side, so they are jumped over."""
        low, high = np.searchsorted(self.owner, self.owner[stretch] + np.array([0, 1]))
        at = int(draw.integers(len(self) - (high - low)))
        return self._text(at if at < low else at + int(high - low))


def stretches(tokens: Tokens, room: int, special: np.ndarray) -> tuple[np.ndarray, ...]:
    """Documents in stretches of at most `room` tokens: begin, size and document of each.

    A document's closing token is left out, and so is what is shorter than LEAST.
    """
    ends = np.asarray([len(tokens.ids)]) if tokens.ends is None else tokens.ends
    begins = np.concatenate([[0], ends[:-1]])
    ends = ends - special[tokens.ids[ends - 1]]
    counts = -(-(ends - begins) // room)
    owner = np.repeat(np.arange(len(ends)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = begins[owner] + number * room
    size = np.minimum(room, ends[owner] - first)
    kept = size >= LEAST
    return first[kept], size[kept], owner[kept]


def pairs(
    kind: Kind,
    source: Source,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    progress: Progress | None = None,
    **settings: Any,
) -> Pairs | None:
    """Pairs of `config.context` tokens at most; masked as well where the model has an LM head too,
    by settings that are Masking's.

    ConfigError without [CLS] and [SEP]; DataError for next sentence over a single document.
    """
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    if cls is None or sep is None:
        raise ConfigError("pairs need a cls and a sep token: take a tokenizer of BERT's kind")
    room = config.context - FRAME
    if room < LEAST:
        raise ConfigError(f"context is {config.context}: a pair needs {LEAST + FRAME} or more")
    found = framed(FRAME, source, tokenizer, model, config, split, progress)
    if found is None:
        return None
    masking = Masking.of(tokenizer, **settings) if _has_language_head(model, kind) else None
    special = np.zeros(tokenizer.vocab_size, bool)
    special[list(tokenizer.special_ids)] = True
    first, size, owner = stretches(found.tokens, room, special)
    if len(first) == 0 or (kind == "nsp" and owner[0] == owner[-1]):
        if split == "valid":
            return None
        need = "two documents" if kind == "nsp" else "one document"
        raise DataError(f"the text has not {need} of {LEAST} tokens: give a text a document")
    frame = (cls, sep, tokenizer.pad_id or 0)
    return Pairs(found.tokens, first, size, owner, kind, room, config.seed, frame, masking)


def _has_language_head(model: Any, kind: Kind) -> bool:
    if isinstance(model.head, Heads) and kind not in model.head:
        raise ConfigError(f"the model has heads for {', '.join(model.head)}, and none for {kind}")
    return isinstance(model.head, Heads) and "lm" in model.head


def _pair_loss(kind: Kind, model: Any, batch: PairBatch) -> Loss:
    """Cross-entropy of the pairs, and of the masked tokens where there are any."""
    name = kind if isinstance(model.head, Heads) else None
    hidden = model.hidden(batch.input_ids, head=name, **extras(batch))
    logits = model.answer(hidden, batch.attention_mask, name)
    nll = F.cross_entropy(logits.float(), batch.pair_labels, reduction="sum")
    answers = (logits.detach().argmax(-1) == batch.pair_labels,)
    if not batch.is_masked:
        return Loss(nll, batch.tokens(), {"loss": nll.detach()}, answers, lambda: logits)
    masked = masked_loss(model, hidden, batch)
    nll = nll * batch.pair_weight
    total = nll + masked.total
    terms = {"loss": total, kind: nll, "masked": masked.total}
    shown = {name: term.detach() for name, term in terms.items()}
    return Loss(total, batch.tokens(), shown, answers + masked.answers, lambda: logits)


def pair_accuracy(
    model: Any, dataset: Any, answers: Sequence[tuple[Tensor, ...]]
) -> Mapping[str, float]:
    """The share of pairs told right, and of masked tokens where there are any."""
    names = ("accuracy", "masked_accuracy")
    sides = [torch.cat(side).float() for side in zip(*answers, strict=True)]
    return {name: float(side.mean()) for name, side in zip(names, sides, strict=False)}


nsp_pairs, sop_pairs = partial(pairs, "nsp"), partial(pairs, "sop")
nsp, sop = partial(_pair_loss, "nsp"), partial(_pair_loss, "sop")
