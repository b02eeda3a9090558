"""Guesses of what comes next, which the model then reads at once and keeps as far as they agree.

A token is drawn from the model's own logits and the text's own random numbers, whoever guessed, so
a text is the same with any proposer or none (drafter-invariant speculation, Daliri et al. 2024).
"""

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.generate.memory import Memory
from polyhead.generate.request import Text
from polyhead.generate.runner import Piece, Runner
from polyhead.models.model import TaskModel, require_causal


class Draws(Protocol):
    """What an engine's sampler does for a draft that is not its own: the same draws."""

    def __call__(self, logits: Tensor, slots: Any, written: Any) -> Tensor: ...

    def write(self, slot: Any, start: int, ids: Sequence[int]) -> None: ...


class Proposer:
    """Guesses for texts that decode; `num_tokens` at most for each."""

    def __init__(self, num_tokens: int) -> None:
        if num_tokens < 1:
            raise ConfigError(f"num_tokens={num_tokens} must be 1 or more")
        self.num_tokens = num_tokens
        self.proposed = 0
        self.accepted = 0

    @property
    def acceptance(self) -> float:
        """The share of guesses that were right."""
        return self.accepted / max(1, self.proposed)

    def propose(self, texts: Sequence[Text], draws: Draws) -> list[list[int]]:
        """Tokens that may follow each text; an empty list is no guess."""
        raise NotImplementedError

    def observe(self, text: Text, drawn: Sequence[int], kept: int) -> None:
        """Learn what was drawn at each place of a draft, of which `kept` guesses were right."""
        self.proposed += len(drawn) - 1
        self.accepted += kept

    def forget(self, text: Text) -> None:
        """The text is done."""


class NgramLookup(Proposer):
    """What followed the last time that the text ended like this: for answers that quote.

    The longest of `longest` to 1 tokens that stands earlier in the text counts (Saxena 2023).
    """

    def __init__(self, num_tokens: int = 8, longest: int = 3) -> None:
        super().__init__(num_tokens)
        self.longest = longest
        self._seen: dict[Text, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, texts: Sequence[Text], draws: Draws) -> list[list[int]]:
        return [self._next(text) for text in texts]

    def _next(self, text: Text) -> list[int]:
        ids = text.ids
        until, places = self._seen.get(text, (0, {}))
        # Where each run ended last, the end of the text itself aside.
        for end in range(until + 1, len(ids)):
            for size in range(1, min(self.longest, end) + 1):
                places[tuple(ids[end - size : end])] = end
        self._seen[text] = max(until, len(ids) - 1), places
        for size in range(min(self.longest, len(ids)), 0, -1):
            if place := places.get(tuple(ids[-size:])):
                return ids[place : place + self.num_tokens]
        return []

    def forget(self, text: Text) -> None:
        self._seen.pop(text, None)


class Jacobi(Proposer):
    """Parallel decoding: what the model itself said of the places ahead at the last step, again.

    Guesses that are not right yet become better from step to step, as in Jacobi's iteration for
    systems of equations (Santilli et al. 2023).
    """

    def __init__(self, num_tokens: int = 4) -> None:
        super().__init__(num_tokens)
        self._guesses: dict[Text, list[int]] = {}

    def propose(self, texts: Sequence[Text], draws: Draws) -> list[list[int]]:
        guesses = [self._guesses.get(text, []) for text in texts]
        return [
            [*guess, *[text.ids[-1]] * (self.num_tokens - len(guess))][: self.num_tokens]
            for text, guess in zip(texts, guesses, strict=True)
        ]

    def observe(self, text: Text, drawn: Sequence[int], kept: int) -> None:
        super().observe(text, drawn, kept)
        self._guesses[text] = list(drawn[kept + 1 :])

    def forget(self, text: Text) -> None:
        self._guesses.pop(text, None)


class DraftModel(Proposer):
    """A smaller model of the same vocabulary writes ahead (Leviathan et al. 2023).

    It draws with the text's own random numbers, so that it agrees as often as the two models do.
    """

    def __init__(
        self, model: TaskModel, num_tokens: int = 4, *, max_rows: int = 16, cache_tokens: int = 0
    ) -> None:
        super().__init__(num_tokens)
        require_causal(model)
        self.model = model
        longest: int | None = getattr(model.config, "max_seq_len", None)
        tokens = cache_tokens or max_rows * min(longest or 4096, 4096)
        self.max_len = min(longest or tokens, tokens)
        self.memory = Memory(model.backbone, max_rows, self.max_len, tokens)
        self.runner = Runner(model, self.memory)
        self._own: dict[Text, Text] = {}

    def propose(self, texts: Sequence[Text], draws: Draws) -> list[list[int]]:
        drafts: dict[Text, list[int]] = {text: [] for text in texts}
        going = [text for text in texts if self._follow(text)]
        for place in range(self.num_tokens):
            going = [text for text in going if self._has_room(text)]
            if not going:
                break
            mine = [self._own[text] for text in going]
            pieces = [Piece(own, own.ids[own.held :], 1) for own in mine]
            found = {piece.text: states for piece, states in self.runner.read(pieces)}
            states = torch.cat([found[piece.text] for piece in pieces])
            for piece in pieces:
                piece.text.held += len(piece.ids)
            slots = [text.slot for text in going]
            for text in going:
                draws.write(text.slot, text.written, drafts[text])
            written = [text.written + place for text in going]
            drawn = draws(self.runner.logits(states), slots, written).tolist()
            for text, token in zip(going, drawn, strict=True):
                if token >= 0:
                    drafts[text].append(token)
                    self._own[text].ids.append(token)
            going = [text for text, token in zip(going, drawn, strict=True) if token >= 0]
        return [drafts[text] for text in texts]

    def forget(self, text: Text) -> None:
        own = self._own.pop(text, None)
        if own is not None and own.row is not None:
            self.memory.close(own.row)

    def _follow(self, text: Text) -> bool:
        """Go on from what the text is now; False where there is no row for it."""
        own = self._own.get(text)
        if own is None:
            if not self.memory.num_free_rows:
                return False
            own = self._own[text] = Text(text.request, text.number, None)
            own.row = self.memory.open()
        own.ids = list(text.ids)
        # What it holds of its own guesses is right as far as they were kept.
        own.held = min(own.held, len(text.ids) - 1)
        self.memory.leave_behind(cast(int, own.row), max(0, own.held - self.num_tokens))
        return True

    def _has_room(self, text: Text) -> bool:
        own = self._own[text]
        row, length = cast(int, own.row), len(own.ids)
        return length <= self.max_len and self.memory.make_room([(row, own.held, length)])


def first_layers(model: TaskModel, num_layers: int) -> TaskModel:
    """The model without its later layers, its weights shared: a draft that costs no memory.

    What a layer adds shrinks with depth, so that the norm and the head can often read an earlier
    one (Elhoushi et al. 2024). Errors: ConfigError for a number of layers that it does not have,
    and for a model that is not one stack of layers.
    """
    backbone: Any = model.backbone
    config: Any = model.config
    if not isinstance(getattr(backbone, "layers", None), nn.ModuleList):
        raise ConfigError(f"{config.model_type} is not one stack of layers; give a draft model")
    total = config.num_layers
    if not 1 <= num_layers < total:
        raise ConfigError(f"num_layers={num_layers} must be from 1 to {total - 1}")
    cut = {
        field.name: value[:num_layers]
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), tuple) and len(value) == total
    }
    thin = _with_part(backbone, "layers", nn.ModuleList(backbone.layers[:num_layers]))
    short = _with_part(model, "backbone", thin)
    thin.config = short.config = replace(config, num_layers=num_layers, **cut)
    return short


def _with_part(module: nn.Module, name: str, part: nn.Module) -> Any:
    """A copy with another part in place of one; all others are shared."""
    other = copy.copy(module)
    # Set as an attribute, it would be set in both: a copy shares the table of its parts.
    vars(other)["_modules"] = {**vars(module)["_modules"], name: part}
    return other
