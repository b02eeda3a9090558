"""How surprised a causal model is by tokens, in sliding windows.

`C` tokens that a window reads, `R` windows, `E` model width, `V` vocabulary.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.nn.mode import evaluating

_UNSCORED = -100
_MOST_LOGITS = 1 << 24  # numbers held at once: 64 MB in float32


def summed_nats(
    model: Any, rows: Iterable[Tensor], context: int, stride: int, batch_size: int
) -> tuple[float, int]:
    """The summed -log p of each row's tokens but the first, and how many those are.

    rows: ids `[N]` each, of any length. A window reads `context` tokens and begins `stride` after
    the one before; a token is scored in the first window that reaches it, so each once, with at
    least `context - stride` tokens before it wherever the row has them. Memory does not grow with
    the rows: `batch_size` windows at once, and logits in pieces.
    """
    windows = (window for ids in rows for window in _windows(ids, context, stride))
    nats, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        while batch := list(islice(windows, batch_size)):
            some, count = _score(model, batch)
            nats, tokens = nats + some, tokens + count
    return nats, tokens


def _windows(ids: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What each window reads, and what it is to predict where nobody did before: `[C]` both."""
    last, scored = len(ids) - 1, 0
    for start in range(0, max(0, last), stride):
        end = min(start + context, last)
        wanted = ids[start + 1 : end + 1].clone()
        wanted[: scored - start] = _UNSCORED
        yield ids[start:end], wanted
        scored = end
        if end == last:
            return


def _score(model: Any, batch: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Windows padded on the right, where no causal row can see it."""
    longest = max(len(ids) for ids, _ in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    wanted = torch.full_like(inputs, _UNSCORED)
    for row, (ids, targets) in enumerate(batch):
        inputs[row, : len(ids)] = ids
        wanted[row, : len(targets)] = targets
    device = next(model.parameters()).device
    hidden, wanted = model.backbone(inputs.to(device)), wanted.to(device)
    counted = wanted != _UNSCORED
    hidden, targets = hidden[counted], wanted[counted]
    nats = 0.0
    rows = max(_MOST_LOGITS // model.config.vocab_size, 1)
    for some, these in zip(hidden.split(rows), targets.split(rows), strict=True):
        losses = F.cross_entropy(model.head(some).float(), these, reduction="none")
        nats += losses.double().sum().item()
    return nats, len(targets)
