"""What belongs together, told from the rest of the batch: texts and texts, texts and images.

B rows, N candidates, E width of a vector.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.examples import TextInputs, digest_of, part_of, strings
from polyhead.train.images import images_of
from polyhead.train.objectives import Loss
from polyhead.train.records import Table

Inputs = Mapping[str, Tensor]
Encode = Callable[[Inputs], Tensor]
_RANKED_AT_ONCE = 1024


@dataclass(frozen=True)
class PairBatch:
    """sides: inputs of B rows, of what belongs to each, and perhaps of B hard negatives.

    same: where a candidate of another row is a row's right one word for word, and so is no wrong
    one [B, N]; N is B, or 2 B with hard negatives.
    """

    sides: tuple[Inputs, ...]
    same: Tensor

    def tokens(self) -> int:
        """How many rows."""
        return len(self.same)

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        sides = [{n: v.to(device) for n, v in side.items()} for side in self.sides]
        return PairBatch(tuple(sides), self.same.to(device))


@dataclass(frozen=True)
class PairCollator:
    """Texts, their pairs, and hard negatives where the table has them."""

    inputs: TextInputs

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> PairBatch:
        roles = ("text", "pair", "negative") if "negative" in rows[0] else ("text", "pair")
        sides = tuple(self.inputs([row[role] for row in rows]) for role in roles)
        right = [row["pair"] for row in rows]
        candidates = [row[role] for role in roles[1:] for row in rows]
        return PairBatch(sides, repeated(right, candidates))


def repeated(right: Sequence[Any], candidates: Sequence[Any]) -> Tensor:
    """Where another row's candidate equals a row's right one [B, N]."""
    same = torch.tensor([[one == other for other in candidates] for one in right])
    same[:, : len(right)].fill_diagonal_(False)
    return same


def paired_texts(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Rows of `text` and `pair`, and perhaps `negative`."""
    for role, values in table.columns.items():
        strings(values, role, table.name)
    part = part_of(table, config, split)
    if part is None:
        return None
    inputs = TextInputs.of(tokenizer, model, config)
    seal = digest_of(table, tokenizer, inputs.max_len, split)
    return Examples(part, PairCollator(inputs), config.seed, seal)  # pyright: ignore[reportArgumentType]


def contrastive(
    model: Any, batch: PairBatch, scale: float = 20.0, symmetric: bool = False, chunk: int = 0
) -> Loss:
    """Cross-entropy of each row's own pair among all candidates, by cosines times `scale`.

    scale: one over the temperature. symmetric: meaned with that of each pair's own row. chunk: rows
    that are held at once, so that a batch may be as large as one likes (`cached`); 0 is all.
    (Henderson et al. 2017; van den Oord et al. 2018.)
    """
    sides = [_encoded(lambda side: model(**side), side, chunk) for side in batch.sides]
    vectors = [F.normalize(side.float(), dim=-1) for side in sides]
    rows, candidates = vectors[0], torch.cat(vectors[1:])
    logits = (scale * rows @ candidates.T).masked_fill(batch.same, float("-inf"))
    total = _own(logits, symmetric)
    answers = rows.detach(), vectors[1].detach()
    return Loss(total, batch.tokens(), {"loss": total.detach()}, answers, lambda: logits)


def _own(logits: Tensor, symmetric: bool) -> Tensor:
    """Sum of the cross-entropies of the diagonal, by rows or both ways."""
    own = torch.arange(len(logits), device=logits.device)
    total = F.cross_entropy(logits, own, reduction="sum")
    if not symmetric:
        return total
    return (total + F.cross_entropy(logits[:, : len(own)].T, own, reduction="sum")) / 2


def _encoded(encode: Encode, inputs: Inputs, chunk: int) -> Tensor:
    rows = len(next(iter(inputs.values())))
    if chunk < 0:
        raise ConfigError(f"chunk is {chunk}: rows held at once, or 0 for all")
    is_whole = not 0 < chunk < rows or not torch.is_grad_enabled()
    return encode(inputs) if is_whole else cached(encode, inputs, chunk)


def cached(encode: Encode, inputs: Inputs, chunk: int) -> Tensor:
    """Vectors `encode(inputs)` whose gradient is that of the whole, in the memory of one chunk.

    They are made without a graph, chunk by chunk; when their gradient is there, each chunk is made
    again with one, with the same random numbers, and takes its part (GradCache, Gao et al. 2021).
    """
    names, values = list(inputs), [value.split(chunk) for value in inputs.values()]
    parts = [dict(zip(names, some, strict=True)) for some in zip(*values, strict=True)]
    states: list[list[Tensor]] = []
    with torch.no_grad():
        made: list[Tensor] = []
        for part in parts:
            states.append(_random_state())
            made.append(encode(part))
    vectors = torch.cat(made).requires_grad_()

    def again(gradient: Tensor) -> None:
        for part, state, share in zip(parts, states, gradient.split(chunk), strict=True):
            with torch.enable_grad(), _replaying(state):
                encode(part).backward(share)

    vectors.register_hook(again)
    return vectors


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


@contextmanager
def _replaying(state: list[Tensor]) -> Any:
    """Random numbers from `state` on, and afterwards as if nothing had been drawn."""
    before = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


@dataclass(frozen=True)
class TextsAndImages:
    """A tokenizer and a processor, for what reads both; saved into one directory."""

    tokenizer: Any
    processor: Any

    def save(self, directory: str | Path) -> None:
        """Both side by side."""
        self.tokenizer.save(directory)
        self.processor.save(directory)


@dataclass(frozen=True)
class CaptionCollator:
    """Captions and their images."""

    inputs: TextInputs
    processor: Any
    folder: Path

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        pixels = self.processor(images_of([row["image"] for row in rows], self.folder))
        texts = [row["text"] for row in rows]
        return PairBatch((self.inputs(texts), {"pixel_values": pixels}), repeated(texts, texts))


def captioned_images(
    table: Table, tokenizer: TextsAndImages, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Rows of `image` (a path or an array) and `text`."""
    strings(table.columns["text"], "text", table.name)
    part = part_of(table, config, split)
    if part is None:
        return None
    inputs = TextInputs.of(tokenizer.tokenizer, model, config)
    collate = CaptionCollator(inputs, tokenizer.processor, Path(table.name).parent)
    seal = digest_of(table, tokenizer.tokenizer, inputs.max_len, tokenizer.processor, split)
    return Examples(part, collate, config.seed, seal)  # pyright: ignore[reportArgumentType]


def clip(model: Any, batch: PairBatch, chunk: int = 0) -> Loss:
    """Cross-entropy of each text's image and of each image's text, meaned (Radford et al. 2021).

    The scale is the model's own. chunk: as in `contrastive`.
    """
    texts, images = batch.sides
    a = _encoded(lambda side: model.encode_text(**side), texts, chunk)
    b = _encoded(lambda side: model.encode_image(**side), images, chunk)
    a, b = (F.normalize(side.float(), dim=-1) for side in (a, b))
    # The same caption twice is right for both its images.
    logits = model.answer(a @ b.T).masked_fill(batch.same, float("-inf"))
    total = _own(logits, symmetric=True)
    answers = a.detach(), b.detach()
    return Loss(total, batch.tokens(), {"loss": total.detach()}, answers, lambda: logits)


def recall_figures(
    model: Any, dataset: Examples, answers: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Of all rows, those whose own is nearest of all pairs (recall_at_1), or among the 10; and the
    mean of one over its rank (mrr)."""
    rows, candidates = (torch.cat(side) for side in zip(*answers, strict=True))
    ranks: list[Tensor] = []
    for at in range(0, len(rows), _RANKED_AT_ONCE):
        scores = rows[at : at + _RANKED_AT_ONCE] @ candidates.T
        own = scores.diagonal(at)[:, None]
        ranks.append((scores >= own).sum(1))
    rank = torch.cat(ranks).double()
    return {
        "recall_at_1": float((rank <= 1).double().mean()),
        "recall_at_10": float((rank <= 10).double().mean()),
        "mrr": float((1 / rank).mean()),
    }
