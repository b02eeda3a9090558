"""Models that read one token a row at a time, and whose rows a search may choose."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.model import TaskModel
from polyhead.nn.cache import Caches
from polyhead.nn.mask import Mask


class Steps:
    """`N` rows over caches; the logits are those after the last token of each."""

    def __init__(self, model: TaskModel, caches: Caches) -> None:
        self.model, self.caches = model, caches

    def read(self, ids: Tensor) -> Tensor:
        """One more token a row `[N, 1]`; logits `[N, V]`."""
        raise NotImplementedError

    def select(self, rows: Sequence[int], texts: Sequence[int] | None = None) -> None:
        """Go on with these rows; `texts` are those still at work, where that changes."""
        self.caches.select(rows, texts)

    def _logits(self, hidden: Tensor) -> Tensor:
        return cast(nn.Module, self.model.head)(hidden)


class DecoderSteps(Steps):
    """A decoder that goes on from its prompts `[B, T]`, padded on the right."""

    def __init__(self, model: TaskModel, prompts: Sequence[Sequence[int]]) -> None:
        backbone: Any = model.backbone
        super().__init__(model, backbone.make_caches(len(prompts)))
        ids, keep = padded(prompts, model.device)
        hidden = backbone(ids, attention_mask=keep, caches=self.caches)
        last = keep.sum(1) - 1
        self.first = self._logits(hidden[torch.arange(len(prompts), device=last.device), last])

    def read(self, ids: Tensor) -> Tensor:
        return self._logits(self.model.backbone(ids, caches=self.caches)[:, -1])


class TranslationSteps(Steps):
    """A decoder over the memory of its sources, which are encoded once."""

    def __init__(self, model: TaskModel, sources: Sequence[Sequence[int]], start: int) -> None:
        self.backbone = cast(EncoderDecoder, model.backbone)
        super().__init__(model, self.backbone.make_caches(len(sources)))
        ids, keep = padded(sources, model.device)
        self.mask = Mask() if bool(keep.all()) else Mask(keep=keep)
        self.memory = self.backbone.encode(ids, self.mask)
        self.first = self.read(torch.full((len(sources), 1), start, device=ids.device))

    def read(self, ids: Tensor) -> Tensor:
        hidden = self.backbone.decode(ids, self.memory, self.mask, caches=self.caches)
        return self._logits(hidden[:, -1])

    def select(self, rows: Sequence[int], texts: Sequence[int] | None = None) -> None:
        super().select(rows, texts)
        if texts is not None:
            index = torch.tensor(texts, device=self.memory.device)
            self.memory = self.memory[index]
            if self.mask.keep is not None:
                self.mask = Mask(keep=self.mask.keep[index])


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids as `[B, T]`, padded on the right, and which of them count."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]
