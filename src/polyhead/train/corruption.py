"""T5's span corruption: spans give way to sentinels, and the decoder writes the spans.

(Raffel et al. 2020, section 3.1.4.) The statistics are those of `random_spans_noise_mask` in T5's
source: the numbers of noise tokens and spans are fixed, spans take turns beginning with text that
stays, and every division of the tokens among the spans is equally likely.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyhead.errors import ConfigError
from polyhead.generate.seq2seq import start_id
from polyhead.nn.head import Heads
from polyhead.train.config import TrainConfig
from polyhead.train.data import Split, Windows
from polyhead.train.masked import drawn, framed, hits
from polyhead.train.objectives import (
    Loss,
    Seq2SeqBatch,
    head_cross_entropy,
    shifted,
)
from polyhead.train.sources import Source
from polyhead.train.tokens import Progress


@dataclass(frozen=True)
class Corruption:
    """How much of a text is noise, and in spans of how many tokens on average."""

    density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ConfigError(f"density is {self.density}: a share between 0 and 1 is noise")
        if self.mean_span < 1:
            raise ConfigError(f"mean_span is {self.mean_span}: a span has at least 1 token")

    def counts(self, length: int) -> tuple[int, int]:
        """Noise tokens and noise spans of a text."""
        noise = min(max(round(length * self.density), 1), length - 1)
        # No more spans than there are tokens to stand between them.
        return noise, min(max(round(noise / self.mean_span), 1), length - noise)

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of the input and of the target that a text becomes, the closing one included."""
        noise, spans = self.counts(length)
        return length - noise + spans + 1, noise + spans + 1

    def length(self, input_size: int) -> int:
        """The longest text whose input takes at most `input_size` tokens, as T5 packs them."""
        length = 2
        while self.sizes(length + 1)[0] <= input_size:
            length += 1
        return length

    def noise(self, length: int, draw: np.random.Generator) -> np.ndarray:
        """Which tokens are noise, bool [length]."""
        noise, spans = self.counts(length)
        hidden, kept = parts(noise, spans, draw), parts(length - noise, spans, draw)
        turns = np.stack([kept, hidden], axis=1).ravel()
        return np.repeat(np.arange(2 * spans) % 2 == 1, turns)


def parts(count: int, spans: int, draw: np.random.Generator) -> np.ndarray:
    """Sizes of `spans` parts of at least 1 that make up `count`, every choice equally likely."""
    cuts = np.sort(draw.choice(count - 1, spans - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [count]]))


def corrupted(
    ids: np.ndarray, noise: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads and what the decoder writes: `a <0> d` and `<0> b c`."""
    return _replaced(ids, noise, sentinels), _replaced(ids, ~noise, sentinels)


def _replaced(ids: np.ndarray, gone: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Each run of what is gone as one sentinel, in order."""
    first = gone & ~np.concatenate([[False], gone[:-1]])
    ids = ids.copy()
    ids[first] = sentinels[: first.sum()]
    return ids[~gone | first]


@dataclass(frozen=True, eq=False)
class CorruptedWindows:
    """Windows corrupted; row n's spans are a function of (seed, n) alone."""

    windows: Windows
    corruption: Corruption
    sentinels: np.ndarray
    end_id: int | None
    start_id: int
    pad_id: int

    @property
    def digest(self) -> str:
        """The corpus, its tokenizer and the corruption."""
        c = self.corruption
        return f"{self.windows.digest} corruption {c.density} {c.mean_span}"

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, index: int, batch_size: int) -> Seq2SeqBatch:
        """The index-th batch of the run; every row has the same sizes, so nothing is padded."""
        length, first = self.windows.context, index * batch_size
        starts = self.windows.starts(first, batch_size)
        rows = self.windows.tokens.ids[starts[:, None] + np.arange(length)].astype(np.int64)
        inputs, targets = [], []
        for number, row in enumerate(rows):
            noise = self.corruption.noise(length, drawn(self.windows.seed, first + number))
            read, written = corrupted(row, noise, self.sentinels)
            inputs.append(self._closed(read))
            targets.append(self._closed(written))
        labels = torch.from_numpy(np.stack(targets))
        before = shifted(labels, self.start_id, self.pad_id)
        ids = torch.from_numpy(np.stack(inputs))
        return Seq2SeqBatch(ids, labels, decoder_input_ids=before)

    def _closed(self, ids: np.ndarray) -> np.ndarray:
        return ids if self.end_id is None else np.append(ids, self.end_id)


def sentinels_of(tokenizer: Any, count: int) -> np.ndarray:
    """The ids of `<extra_id_0>` … , `count` of them; ConfigError where there are fewer."""
    ids = [tokenizer.vocab.get(f"<extra_id_{i}>") for i in range(count)]
    if None in ids:
        raise ConfigError(
            f"{count} spans need sentinels <extra_id_0> to <extra_id_{count - 1}>, and the "
            f"tokenizer has {ids.index(None)}: train one with them in extra_tokens"
        )
    return np.asarray(ids, dtype=np.int64)


def corrupted_windows(
    source: Source,
    tokenizer: Any,
    model: Any,
    config: TrainConfig,
    split: Split,
    progress: Progress | None = None,
    **settings: Any,
) -> CorruptedWindows | None:
    """Inputs of `config.context` tokens at most; settings are Corruption's."""
    corruption = Corruption(**settings)
    if config.context < 4:
        raise ConfigError(f"context is {config.context}: spans and their sentinels need 4 or more")
    frame = config.context - corruption.length(config.context)
    found = framed(frame, source, tokenizer, model, config, split, progress)
    if found is None:
        return None
    sentinels = sentinels_of(tokenizer, corruption.counts(found.context)[1])
    start, pad = start_id(model, tokenizer), tokenizer.pad_id
    if start is None:
        raise ConfigError("the tokenizer has no token that starts a target: give it a pad token")
    return CorruptedWindows(
        found, corruption, sentinels, tokenizer.eos_id, start, start if pad is None else pad
    )


def span_corruption(model: Any, batch: Seq2SeqBatch) -> Loss:
    """Cross-entropy of the spans, each token given those before it."""
    hidden = model.backbone(batch.input_ids, batch.decoder_input_ids)
    top = model.head.pick("lm") if isinstance(model.head, Heads) else model.head
    nll = head_cross_entropy(top, hidden, batch.labels)
    states, labels = hidden.flatten(0, 1), batch.labels.flatten()
    answers = () if model.training else (hits(top, states.detach(), labels),)
    return Loss(nll, batch.tokens(), {"loss": nll.detach()}, answers, lambda: top(states))
