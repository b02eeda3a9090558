"""The model, as the engine runs it: pieces of texts in, hidden states and logits out."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.generate.memory import Memory
from polyhead.generate.prompts import padded
from polyhead.generate.request import Text
from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.model import TaskModel
from polyhead.nn.mask import Mask

_WASTE = 1.25
"""Rows of one forward have this many times their own tokens with padding, at most."""


class Piece(NamedTuple):
    """Tokens of a text that are to be read now, and of how many of the last ones logits are wanted.

    The tokens go on from what the text holds.
    """

    text: Text
    ids: Sequence[int]
    wanted: int


class Runner:
    """Reads pieces in as few forwards as waste little; row `b` of a forward is a text's own row."""

    def __init__(
        self, model: TaskModel, memory: Memory, static: bool = False, compile: bool = False
    ) -> None:
        self.model, self.memory = model, memory
        backbone = model.backbone
        self.has_source = isinstance(backbone, EncoderDecoder) and backbone.encoder is not None
        if (static or compile) and self.has_source:
            raise ConfigError("static steps are for decoders; leave static and compile out")
        self.static = static or compile
        self._step = torch.compile(self._next, dynamic=False) if compile else self._next

    def read(self, pieces: Sequence[Piece]) -> list[tuple[Piece, Tensor]]:
        """The hidden states `[wanted, E]` at the end of each piece that wants some."""
        found: list[tuple[Piece, Tensor]] = []
        for batch in _alike(pieces):
            hidden = self._forward(batch)
            for row, piece in enumerate(batch):
                end = len(piece.ids)
                if piece.wanted:
                    found.append((piece, hidden[row, end - piece.wanted : end]))
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[N, V]` of hidden states `[N, E]`."""
        return cast(nn.Module, self.model.head)(hidden)

    def _forward(self, batch: Sequence[Piece]) -> Tensor:
        """Hidden states `[B, T, E]`."""
        texts = [piece.text for piece in batch]
        counts = [len(piece.ids) for piece in batch]
        width, device = max(counts), self.memory.device
        if self.static and width == 1 and min(text.held for text in texts) > 0:
            return self._fixed(batch)
        ids, counted = padded([piece.ids for piece in batch], device)
        keep = counted if min(counts) < width else None
        rows = [cast(int, text.row) for text in texts]
        caches = self.memory.caches
        caches.open(rows, [text.held for text in texts], counts)
        if self.has_source:
            return self._translate(texts, rows, ids, keep)
        shown = [
            text.request.pixels.to(device)
            for text in texts
            if text.request.pixels is not None and text.held < len(text.request.prompt)
        ]
        extra = {"pixel_values": torch.cat(shown)} if shown else {}
        return self.model.backbone(ids, attention_mask=keep, caches=caches, **extra)

    def _fixed(self, batch: Sequence[Piece]) -> Tensor:
        """The same for one token a text, in the shapes of every such step."""
        missing = self.memory.max_rows - len(batch)
        ids = [[piece.ids[0]] for piece in batch] + [[0]] * missing
        rows = [cast(int, piece.text.row) for piece in batch]
        self.memory.caches.open_fixed(rows, [piece.text.held for piece in batch])
        return self._step(torch.tensor(ids, device=self.memory.device))

    def _next(self, ids: Tensor) -> Tensor:
        return self.model.backbone(ids, caches=self.memory.caches)

    def _translate(
        self, texts: Sequence[Text], rows: Sequence[int], ids: Tensor, keep: Tensor | None
    ) -> Tensor:
        backbone, caches = cast(EncoderDecoder, self.model.backbone), self.memory.caches
        sources = [text.request.source for text in texts]
        lengths = [len(source) for source in sources]
        are_new = texts[0].held == 0
        width = max(lengths)
        held, counted = padded(sources, ids.device)
        mask = Mask(keep=counted) if min(lengths) < width else Mask()
        if are_new:
            memory = backbone.encode(held, mask)
        else:
            # Only its length is looked at: keys and values are held.
            memory = backbone.embedding.weight.new_empty(1, 1, 1).expand(len(texts), width, 1)
        caches.open_sources(rows, lengths, are_new)
        return backbone.decode(ids, memory, mask, keep, caches=caches)


def _alike(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that one forward reads: all begun or none, and of like length."""

    def place(piece: Piece) -> tuple[bool, int]:
        return piece.text.held > 0, len(piece.ids)

    batch: list[Piece] = []
    tokens = 0
    for piece in sorted(pieces, key=place):
        begun, length = place(piece)
        fits = (len(batch) + 1) * length <= _WASTE * (tokens + length)
        if batch and not (fits and (batch[0].text.held > 0) == begun):
            yield batch
            batch, tokens = [], 0
        batch.append(piece)
        tokens += length
    if batch:
        yield batch
