"""The cache of layers with a window: a ring, and what has left it is forgotten."""

import torch
from torch import Tensor

from polyhead.nn.cache import Cache, write
from polyhead.nn.mask import Mask


class RollingCache(Cache):
    """A ring of the last `window` positions, for layers that see no further back."""

    def __init__(
        self, batch: int, num_kv_heads: int, head_dim: int, window: int, like: Tensor
    ) -> None:
        self.window = window
        shape = (batch, num_kv_heads, window + 1, head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)
        self.wrapped = False

    def append(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        last = at.max(1, keepdim=True).values
        slots = torch.where((at >= 0) & (at > last - self.window), at % self.window, -1)
        if at.shape[1] == 1:
            write(self.k, self.v, k, v, slots)
            return self.k[:, :, :-1], self.v[:, :, :-1]
        # Several tokens: the first of them sees what the last of them will overwrite.
        seen_k = torch.cat([self.k[:, :, :-1], k], dim=2)
        seen_v = torch.cat([self.v[:, :, :-1], v], dim=2)
        write(self.k, self.v, k, v, slots)
        return seen_k, seen_v

    def keys_at(self, at: Tensor) -> Tensor:
        before = self.lengths[:, None] - 1
        if at.shape[1] == 1:
            return self._ring(torch.maximum(before, at))
        return torch.cat([self._ring(before), at], dim=1)

    def place(self, mask: Mask, at: Tensor) -> Mask:
        return mask.placed(self.lengths, self.keys_at(at))

    def reserve(self, length: int) -> None:
        self.wrapped = self.wrapped or length > self.window

    def check_truncation(self) -> None:
        if self.wrapped:
            raise ValueError(
                f"a rolling cache of {self.window} has forgotten what truncation would need; "
                "start again from the prompt"
            )

    def _ring(self, last: Tensor) -> Tensor:
        """Positions `[B, window]` of the slots when `last` `[B, 1]` is the newest position."""
        slots = torch.arange(self.window, device=last.device)
        return (last - (last - slots) % self.window).clamp(min=-1)
