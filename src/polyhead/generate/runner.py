"""The model, as the engine runs it: pieces of texts in, hidden states and logits out."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.generate.graphs import CudaRecorder, GraphSteps
from polyhead.generate.memory import Memory
from polyhead.generate.prompts import padded
from polyhead.generate.request import Text
from polyhead.kernels.decode import DecodeSteps, Ends
from polyhead.models.encoder_decoder import EncoderDecoder
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mask import Mask
from polyhead.nn.mode import evaluating
from polyhead.nn.position import Position

_WASTE = 1.25
"""Rows of one forward have this many times their own tokens with padding, at most."""
_FEW = 512
"""Tokens whose forward takes its time from the weights, so that all of them share one."""


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
        attentions = [part for part in backbone.modules() if isinstance(part, MultiHeadAttention)]
        positions = [part for part in backbone.modules() if isinstance(part, Position)]
        # States go on by rows; some positions look at all the keys of a row at once.
        self._mixes = bool(attentions) and not (
            self.static or self.has_source or memory.states
            or any(part.rotates_late or part.has_values for part in positions)
        )  # fmt: skip
        self._attentions = attentions
        self._recorded = None
        if not (self.static or memory.states):
            self._recorded = _steps(model, memory)
        self._step = torch.compile(self._next, dynamic=False) if compile else self._next

    def prepare(self) -> None:
        """Do now what would otherwise be done when steps come for the third time."""
        if isinstance(self._recorded, DecodeSteps):
            self._recorded.prepare()

    def read(self, pieces: Sequence[Piece]) -> list[tuple[Piece, Tensor]]:
        """The hidden states `[wanted, E]` at the end of each piece that wants some."""
        found: list[tuple[Piece, Tensor]] = []
        recorded = [piece for piece in pieces if self._may_replay(piece)]
        if recorded and (hidden := self._replayed(recorded)) is not None:
            found += _wanted(recorded, hidden)
            pieces = [piece for piece in pieces if piece not in recorded]
        if pieces:
            with evaluating(self.model):
                found += self._plain(pieces)
        return found

    def ends(self, pieces: Sequence[Piece]) -> Ends | None:
        """What may follow every token of these pieces, by a recorded step that ends with the head;
        None: ask for their states."""
        if self._recorded is None or not all(map(self._may_replay, pieces)):
            return None
        return self._recorded.ends(*self._tokens(pieces))

    def _plain(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """The same by the model's own forwards."""
        batches = list(_alike(pieces))
        few = [batch for batch in batches if self._may_mix(batch)]
        if len(few) > 1:
            batches = [batch for batch in batches if batch not in few]
            mixed = sorted((piece for batch in few for piece in batch), key=_place)
            yield from _wanted(mixed, self._mixed(mixed))
        for batch in batches:
            yield from _wanted(batch, self._forward(batch))

    def _may_replay(self, piece: Piece) -> bool:
        """Whether a recorded step could read it: nothing but tokens, whose source is held."""
        begins = piece.text.held == 0 and self.has_source
        return self._recorded is not None and not (begins or _shows(piece.text))

    def _replayed(self, batch: Sequence[Piece]) -> list[Tensor] | None:
        """Hidden states `[len(ids), E]` of each, by recorded steps where there are some."""
        assert self._recorded is not None
        hidden = self._recorded.read(*self._tokens(batch))
        return None if hidden is None else list(hidden.split([len(piece.ids) for piece in batch]))

    def _tokens(self, batch: Sequence[Piece]) -> tuple[list[int], list[int], list[int], list[int]]:
        """What a recorded step reads: ids, rows, positions and the lengths of sources."""
        assert self._recorded is not None
        ids: list[int] = []
        rows: list[int] = []
        at: list[int] = []
        sources: list[int] = []
        begins = False
        for piece in batch:
            text, count = piece.text, len(piece.ids)
            begins = begins or text.held < len(text.request.prompt)
            ids += piece.ids
            rows += [cast(int, text.row)] * count
            at += range(text.held, text.held + count)
            if self.has_source:
                sources += [len(text.request.source)] * count
        if begins:
            self._recorded.check()  # as often as a text begins
        return ids, rows, at, sources

    def _may_mix(self, batch: Sequence[Piece]) -> bool:
        """Whether these may be read beside others, token by token."""
        return (
            self._mixes
            and sum(len(piece.ids) for piece in batch) <= _FEW
            and not any(_shows(piece.text) for piece in batch)
            and not any(attention.probes for attention in self._attentions)
        )

    def _mixed(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Hidden states `[len(ids), E]` of pieces of any lengths, from one forward."""
        parts: list[tuple[list[int], list[int], int]] = []
        for (_, length), some in itertools.groupby(pieces, _place):
            texts = [piece.text for piece in some]
            rows = [cast(int, text.row) for text in texts]
            parts.append((rows, [text.held for text in texts], length))
        caches = self.memory.caches
        caches.open_mixed(parts)
        ids = torch.tensor([id for piece in pieces for id in piece.ids], device=self.memory.device)
        hidden = self.model.backbone(ids[:, None], caches=caches)
        return list(hidden[:, 0].split([len(piece.ids) for piece in pieces]))

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
        shown = [_unread(text).to(device) for text in texts if _shows(text)]
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
            like = next(backbone.parameters())
            memory = like.new_empty(1, 1, 1).expand(len(texts), width, 1)
        caches.open_sources(rows, lengths, are_new)
        return backbone.decode(ids, memory, mask, keep, caches=caches)


def _steps(model: TaskModel, memory: Memory) -> DecodeSteps | GraphSteps:
    """Steps that are recorded once, as the device can."""
    if memory.device.type == "cuda":
        return GraphSteps(model, memory, CudaRecorder())
    return DecodeSteps(model.backbone, model.head, *memory.held(), memory.max_len)


def _wanted(
    batch: Sequence[Piece], hidden: Tensor | Sequence[Tensor]
) -> Iterator[tuple[Piece, Tensor]]:
    """Of the states of each piece, padding after them perhaps, those that are wanted, if any."""
    for piece, states in zip(batch, hidden, strict=False):
        end = len(piece.ids)
        if piece.wanted:
            yield piece, states[end - piece.wanted : end]


def _shows(text: Text) -> bool:
    """Whether a text's images are still to be read."""
    return any(begin >= text.held for begin, _ in text.request.images)


def _unread(text: Text) -> Tensor:
    """Pixels of the images that are still to be read: others were found with the prompt's start."""
    begun = sum(begin < text.held for begin, _ in text.request.images)
    return cast(Tensor, text.request.pixels)[begun:]


def _place(piece: Piece) -> tuple[bool, int]:
    return piece.text.held > 0, len(piece.ids)


def _alike(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that one forward reads: all begun or none, and of like length."""
    batch: list[Piece] = []
    tokens = 0
    for piece in sorted(pieces, key=_place):
        begun, length = _place(piece)
        fits = (len(batch) + 1) * length <= _WASTE * (tokens + length)
        if batch and not (fits and (batch[0].text.held > 0) == begun):
            yield batch
            batch, tokens = [], 0
        batch.append(piece)
        tokens += length
    if batch:
        yield batch
