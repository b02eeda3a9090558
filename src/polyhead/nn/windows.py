"""Attention in windows of an image, and what joins four tokens to one (Liu et al. 2021).

B images, h × w the grid of tokens, n windows a grid, M tokens a window's edge.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mask import EVERYTHING, Lowered
from polyhead.nn.patches import Grid
from polyhead.nn.patterns import shifted_windows
from polyhead.nn.position import Position


@dataclass(frozen=True)
class Windows:
    """A grid cut into windows: `cut` and `join` are one gather each, whatever the shift.

    slots:  `[n * M * M]` the token that stands in each place of each window.
    places: `[h * w]` the place where each token stands.
    filled: `[n * M * M]` where a place has a token at all; None where all have.
    mask:   `[n, 1, M * M, M * M]` which places of a shifted window see each other, or None.
    """

    edge: int
    slots: Tensor
    places: Tensor
    filled: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, grid: Grid, edge: int, shift: int, device: torch.device) -> "Windows":
        """Windows of `edge` tokens; the grid, padded at the bottom and the right, is rolled."""
        height, width = (-(-side // edge) * edge for side in grid)
        token = torch.arange(grid[0] * grid[1], device=device).view(grid)
        token = F.pad(token, (0, width - grid[1], 0, height - grid[0]), value=-1)
        if shift:
            token = token.roll((-shift, -shift), (0, 1))
        slots = token.view(height // edge, edge, width // edge, edge).transpose(1, 2).flatten()
        filled = slots >= 0
        is_padded = height * width > grid[0] * grid[1]
        places = torch.empty_like(token).flatten()[: grid[0] * grid[1]]
        places[slots[filled]] = filled.nonzero().flatten()
        mask = shifted_windows(height, width, edge, shift) if shift else None
        return cls(
            edge,
            slots.clamp(min=0),
            places,
            filled if is_padded else None,
            None if mask is None else mask.dense(edge * edge, edge * edge, device),
        )

    def cut(self, x: Tensor) -> Tensor:
        """Tokens `[B, h * w, E]` in their windows `[B * n, M * M, E]`; what is padded is zero."""
        x = x.index_select(1, self.slots)
        if self.filled is not None:
            x = x * self.filled[:, None]
        return x.view(-1, self.edge**2, x.shape[-1])

    def join(self, x: Tensor, num_images: int) -> Tensor:
        """Windows `[B * n, M * M, E]` as tokens `[B, h * w, E]` again."""
        return x.view(num_images, -1, x.shape[-1]).index_select(1, self.places)

    def lowered(self, num_images: int) -> Lowered:
        """The mask for the windows of several images."""
        if self.mask is None:
            return EVERYTHING
        return Lowered(dense=self.mask.repeat(num_images, 1, 1, 1))


class WindowBias(Position):
    """A learned bias for each head and offset within a window of M × M: `[1, H, M², M²]`.

    A smaller window reads the middle of the table.
    """

    def __init__(self, num_heads: int, edge: int) -> None:
        super().__init__()
        self.edge = edge
        table = torch.empty((2 * edge - 1) ** 2, num_heads)
        self.table = nn.Parameter(table if table.is_meta else table.normal_(std=0.02))

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor:
        edge = round(q.shape[2] ** 0.5)
        at = torch.arange(edge, device=q.device)
        apart = at[:, None] - at + self.edge - 1
        # [rows of q, columns of q, rows of k, columns of k]
        index = apart[:, None, :, None] * (2 * self.edge - 1) + apart[None, :, None, :]
        biases = self.table[index.flatten()].view(edge**2, edge**2, -1)
        return biases.permute(2, 0, 1)[None].contiguous().to(q.dtype)


class PatchMerging(nn.Module):
    """Four neighbours beside each other, normed and halved: `[B, h * w, E]` to `[B, .., 2 E]`."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * d_model)
        self.reduction = nn.Linear(4 * d_model, 2 * d_model, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        height, width = grid
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, width % 2, 0, height % 2))
        # The four in the order of columns, then rows: (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3).flatten(1, 2)))
