"""What stands before the next token of every slot, on the device. `N` rows, `L` tokens so far."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from polyhead.generate.sampling.slot import Slot


class History:
    """Prompt and text of every slot; what is written reaches the device when it is looked at."""

    def __init__(self, slots: int, max_len: int, device: torch.device) -> None:
        self.max_len = max_len
        self.tokens = torch.zeros(slots, 0, dtype=torch.long, device=device)
        self._waiting: dict[tuple[int, int], int] = {}

    def write(self, slot: int, start: int, ids: Sequence[int]) -> None:
        """Tokens `start, start + 1, ...` of a slot, its prompt counted."""
        self._waiting.update(((slot, start + i), token) for i, token in enumerate(ids))

    def grow(self, slots: int) -> None:
        """So many slots more."""
        self.tokens = torch.nn.functional.pad(self.tokens, (0, 0, 0, slots))

    def copy(self, source: int, target: int) -> None:
        self._flush()
        self.tokens[target] = self.tokens[source]

    def last(self, slots: Tensor, lengths: Sequence[int]) -> Tensor:
        """Ids `[N, L]` that end at the right, -1 where a row has none; lengths: of the rows."""
        self._flush()
        width = max(lengths)
        ends = torch.tensor(lengths, device=slots.device)[:, None]
        place = ends - width + torch.arange(width, device=slots.device)
        found = self.tokens[slots[:, None], place.clamp(min=0)]
        return found.masked_fill_(place < 0, -1)

    def _flush(self) -> None:
        if not self._waiting:
            return
        device = self.tokens.device
        needed = 1 + max(place for _, place in self._waiting)
        if needed > (width := self.tokens.shape[1]):
            wanted = min(max(needed, 2 * width), max(self.max_len, needed))
            self.tokens = torch.nn.functional.pad(self.tokens, (0, wanted - width))
        slots, places = torch.tensor(list(self._waiting), device=device).unbind(1)
        self.tokens[slots, places] = torch.tensor(list(self._waiting.values()), device=device)
        self._waiting.clear()


class Step:
    """The rows of one call: which slot each belongs to, and how much of its text counts."""

    def __init__(
        self,
        rows: Sequence[Slot],
        slots: Tensor,
        written: Sequence[int],
        history: History,
    ) -> None:
        self.rows, self.slots, self.written, self._history = rows, slots, written, history

    @cached_property
    def tokens(self) -> Tensor:
        """Prompt and text `[N, L]`, as `History.last` gives it; of rows that need it."""
        pairs = zip(self.rows, self.written, strict=True)
        lengths = [len(row.prompt) + w if row.needs_history else 1 for row, w in pairs]
        return self._history.last(self.slots, lengths)

    @cached_property
    def count(self) -> Tensor:
        """Tokens of the text `[N]`."""
        return torch.tensor(self.written, device=self.slots.device)

    @cached_property
    def drawn(self) -> Tensor:
        """The text alone `[N, L]`, in the same form."""
        width = max(max(self.written), 1)
        tokens = self.tokens[:, -width:]
        place = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
        return tokens.masked_fill(place > self.count[:, None], -1)
