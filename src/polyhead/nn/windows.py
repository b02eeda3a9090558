"""Attention in windows of an image, and what joins four tokens to one (Liu et al. 2021).

B images, h × w the grid of tokens, n windows a grid, M tokens a window's edge.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.patches import Grid
from polyhead.nn.patterns import shifted_windows
from polyhead.nn.position import Position, PreparedBias


@dataclass(frozen=True)
class Windows:
    """A grid cut into windows: `cut` and `join` are one gather each, whatever the shift.

    slots:  `[n * M * M]` the token that stands in each place of each window.
    places: `[h * w]` the place where each token stands.
    filled: `[n * M * M, 1]` where a place has a token at all; None where all have.
    hidden: `[n, 1, M * M, M * M]` minus infinity where places of a shifted window do not see each
            other, else zero; None where all do.
    """

    num_images: int
    edge: int
    slots: Tensor
    places: Tensor
    filled: Tensor | None
    hidden: Tensor | None

    @classmethod
    def of(cls, x: Tensor, grid: Grid, edge: int, shift: int) -> "Windows":
        """Windows of `edge` tokens over x `[B, h * w, E]`.

        The grid is padded at the bottom and the right, then rolled by `shift`.
        """
        height, width = (-(-side // edge) * edge for side in grid)
        token = torch.arange(grid[0] * grid[1], device=x.device).view(grid)
        token = F.pad(token, (0, width - grid[1], 0, height - grid[0]), value=-1)
        if shift:
            token = token.roll((-shift, -shift), (0, 1))
        slots = token.view(height // edge, edge, width // edge, edge).transpose(1, 2).flatten()
        filled = slots >= 0
        places = torch.empty_like(slots[: grid[0] * grid[1]])
        places[slots[filled]] = filled.nonzero().flatten()
        hidden = None
        if shift:
            seen = shifted_windows(height, width, edge, shift).dense(edge**2, edge**2, x.device)
            hidden = x.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
        is_padded = len(slots) > len(places)
        return cls(
            len(x), edge, slots.clamp(min=0), places, filled[:, None] if is_padded else None, hidden
        )

    def cut(self, x: Tensor) -> Tensor:
        """Tokens `[B, h * w, E]` in their windows `[B * n, M * M, E]`; what is padded is zero."""
        x = x.index_select(1, self.slots)
        x = x if self.filled is None else x * self.filled
        return x.view(-1, self.edge**2, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """Windows `[B * n, M * M, E]` as tokens `[B, h * w, E]` again."""
        return x.view(self.num_images, -1, x.shape[-1]).index_select(1, self.places)


class WindowBias(nn.Module):
    """A learned bias for each head and offset within a window of M × M tokens.

    A smaller window reads the middle of the table.
    """

    def __init__(self, num_heads: int, edge: int) -> None:
        super().__init__()
        self.edge = edge
        table = torch.empty((2 * edge - 1) ** 2, num_heads)
        self.table = nn.Parameter(table if table.is_meta else table.normal_(std=0.02))

    def within(self, windows: Windows) -> Position:
        """The bias of these windows `[B * n | 1, H, M * M, M * M]`, what they hide included."""
        biases = self.biases(windows.edge)
        if windows.hidden is None:
            return PreparedBias(biases)
        # Adding what is hidden costs a fifth of masking it, and once serves all the images.
        return PreparedBias((biases + windows.hidden).repeat(windows.num_images, 1, 1, 1))

    def biases(self, edge: int) -> Tensor:
        """`[1, H, edge², edge²]`."""
        at = torch.arange(edge, device=self.table.device)
        row = 2 * self.edge - 1
        place = (at[:, None] * row + at).flatten()
        index = place[:, None] - place + (self.edge - 1) * (row + 1)
        # Keys side by side: what adds these to scores is several times slower over strides.
        return self.table.T.index_select(1, index.flatten()).view(1, -1, edge**2, edge**2)


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
