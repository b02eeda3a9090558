"""The cache of recurrent layers: one state a row, whatever was read."""

import torch
from torch import Tensor

from polyhead.nn.cache import Cache


class StateCache(Cache):
    """Of each row the states of an LSTM after its last token `[B, L, E]`: `k` hidden, `v` cell."""

    def __init__(self, batch: int, num_layers: int, width: int, like: Tensor) -> None:
        self.k = like.new_zeros(batch, num_layers, width)
        self.v = like.new_zeros(batch, num_layers, width)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=like.device)

    def states(self) -> tuple[Tensor, Tensor]:
        """Hidden and cell states `[L, B, E]`; zeros where a row begins."""
        begun = (self.lengths > 0)[:, None, None]
        return (self.k * begun).transpose(0, 1), (self.v * begun).transpose(0, 1)

    def keep(self, hidden: Tensor, cell: Tensor, read: Tensor) -> None:
        """Hold these states `[L, B, E]` of the rows of which something was read `[B]` bool."""
        read = read[:, None, None]
        self.k = torch.where(read, hidden.transpose(0, 1), self.k)
        self.v = torch.where(read, cell.transpose(0, 1), self.v)

    def check_truncation(self) -> None:
        raise ValueError("a recurrent state cannot go back; start again from the prompt")
