"""One token a row, drawn by a uniform number. `N` rows, `V` tokens of the vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 256
_AHEAD = 64


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One index a row `[N]` with the probabilities softmax(logits `[N, V]`).

    uniform `[N]` in [0, 1) picks it: the first index whose cumulative probability exceeds it.
    """
    likely = logits.softmax(1, dtype=torch.float32)
    if likely.shape[1] <= 2 * _BLOCK:
        return first_above(likely, uniform)[0]
    # First the block of tokens, then the token in it: exact sums, but of few numbers.
    vocab, even = likely.shape[1], likely.shape[1] // _BLOCK * _BLOCK
    blocks = likely[:, :even].unflatten(1, (-1, _BLOCK)).sum(2)
    blocks = torch.cat([blocks, likely[:, even:].sum(1, keepdim=True)], dim=1)
    block, rest = first_above(blocks, uniform)
    inside = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=likely.device)
    some = likely.gather(1, inside.clamp(max=vocab - 1)).masked_fill(inside >= vocab, 0)
    return (block * _BLOCK + first_above(some, rest)[0]).clamp(max=vocab - 1)


def likeliest(logits: Tensor) -> Tensor:
    """The index `[N]` of the largest of logits `[N, V]`, or of what is not a number."""
    even = logits.shape[1] // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or not even:
        return logits.argmax(1)
    # There finding the largest is much faster than finding where it is.
    blocks = logits[:, :even].unflatten(1, (-1, _BLOCK)).amax(2)
    start = blocks.argmax(1, keepdim=True) * _BLOCK
    place = torch.arange(_BLOCK, device=logits.device)
    inside = torch.cat(
        [start + place, place[: logits.shape[1] - even].expand(len(start), -1) + even], 1
    )
    return inside.gather(1, logits.gather(1, inside).argmax(1, keepdim=True))[:, 0]


def first_above(likely: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first index `[N]` whose cumulative sum of likely `[N, C]` exceeds uniform × the total.

    Also where, as a share `[N]` of that entry, the point lies.
    """
    cumulative = likely.cumsum(1, dtype=_exact(likely.device))
    total = cumulative[:, -1:]
    target = torch.minimum(uniform.to(total)[:, None] * total, total.nextafter(total * 0))
    index = torch.searchsorted(cumulative, target, right=True)
    index = index.clamp(max=likely.shape[1] - 1)  # what is not a number is past the end
    own = likely.gather(1, index).to(total)
    share = (target - cumulative.gather(1, index) + own) / own
    return index[:, 0], share.clamp(0, 1)[:, 0]


def log_total(logits: Tensor) -> Tensor:
    """Log-sum-exp `[N, 1]` of logits `[N, V]`, from softmax, which is the faster kernel."""
    best = logits.amax(1, keepdim=True)
    likeliest = logits.softmax(1, dtype=torch.float32).amax(1, keepdim=True)
    return best.to(_exact(logits.device)) - likeliest.to(_exact(logits.device)).log()


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


class Streams:
    """Uniform numbers in [0, 1): the i-th of a slot depends on its seed and on i alone."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.generators: list[torch.Generator | None] = [None] * slots
        self.filled = [0] * slots
        self.numbers = torch.zeros(slots, 0, dtype=_exact(device), device=device)

    def grow(self, slots: int) -> None:
        """So many slots more."""
        self.generators += [None] * slots
        self.filled += [0] * slots
        self.numbers = torch.nn.functional.pad(self.numbers, (0, 0, 0, slots))

    def seed(self, slot: int, seed: int) -> None:
        """The slot's numbers are those of this seed from now on."""
        self.generators[slot] = torch.Generator().manual_seed(seed)
        self.filled[slot] = 0

    def at(self, slots: Sequence[int], places: Sequence[int]) -> Tensor:
        """Number `places[n]` of `slots[n]`: `[N]`."""
        for slot, place in zip(slots, places, strict=True):
            while place >= self.filled[slot]:
                self._fill(slot)
        index = torch.tensor([slots, places], device=self.numbers.device)
        return self.numbers[index[0], index[1]]

    def _fill(self, slot: int) -> None:
        start, width = self.filled[slot], self.numbers.shape[1]
        if start + _AHEAD > width:
            self.numbers = torch.nn.functional.pad(self.numbers, (0, max(width, _AHEAD)))
        ahead = torch.rand(_AHEAD, generator=self.generators[slot], dtype=torch.float64)
        self.numbers[slot, start : start + _AHEAD] = ahead.to(self.numbers)
        self.filled[slot] += _AHEAD
