"""Images as tokens: patches, and where they lie. C channels, h × w the grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns: of pixels, or of patches."""


class PatchEmbedding(nn.Module):
    """A vector for each patch: `[B, C, height, width]` to `[B, h * w, E]`, row by row.

    A convolution whose kernel is its stride (Dosovitskiy et al. 2021, equation 1). Pixels beyond
    the last whole patch are left out, or, with `pads`, filled up with zeros to one more. What are
    no images of C channels raises ValueError.
    """

    def __init__(
        self,
        num_channels: int,
        d_model: int,
        patch: Grid,
        *,
        bias: bool = True,
        pads: bool = False,
    ) -> None:
        super().__init__()
        self.num_channels, self.patch, self.pads = num_channels, patch, pads
        self.projection = nn.Conv2d(num_channels, d_model, patch, patch, bias=bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.projection.weight.dtype)
        if self.pads:
            below = -pixels.shape[2] % self.patch[0]
            right = -pixels.shape[3] % self.patch[1]
            pixels = F.pad(pixels, (0, right, 0, below)) if below or right else pixels
        return self.projection(pixels).flatten(2).transpose(1, 2)

    def grid(self, pixel_values: Tensor) -> Grid:
        """Rows and columns of the patches of these images."""
        self.check(pixel_values)
        height, width = pixel_values.shape[2:]
        spare = [edge - 1 if self.pads else 0 for edge in self.patch]
        grid = (height + spare[0]) // self.patch[0], (width + spare[1]) // self.patch[1]
        if min(grid) < 1:
            raise ValueError(
                f"the images are {height} x {width} and one patch is {self.patch[0]} x "
                f"{self.patch[1]}: resize them"
            )
        return grid

    def check(self, pixel_values: Tensor) -> None:
        """Raise ValueError for what are not images of the right number of channels."""
        wanted = f"pass [batch, {self.num_channels}, height, width], as an image processor makes it"
        if not isinstance(pixel_values, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"pixel_values are a {type(pixel_values).__name__}; {wanted}")
        shape, kind = list(pixel_values.shape), pixel_values.dtype
        if len(shape) != 4 or shape[1] != self.num_channels or not pixel_values.numel():
            raise ValueError(f"pixel_values are of shape {shape}; {wanted}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {kind}; {wanted}")


class PatchPositions(nn.Module):
    """A learned vector for each of `num_extra` tokens and each patch of a grid: `[1, T, E]`.

    resizes: whether another grid takes the table interpolated (bicubic, in fp32; the extra tokens
    keep theirs), as DINOv2 does; where not, it raises ValueError.
    """

    def __init__(self, d_model: int, grid: Grid, num_extra: int = 0, resizes: bool = False) -> None:
        super().__init__()
        self.grid, self.num_extra, self.resizes = grid, num_extra, resizes
        table = torch.empty(1, num_extra + grid[0] * grid[1], d_model)
        self.table = nn.Parameter(table if table.is_meta else table.normal_(std=0.02))

    def forward(self, grid: Grid) -> Tensor:
        if grid == self.grid:
            return self.table
        if not self.resizes:
            raise ValueError(
                f"the images have {grid[0]} x {grid[1]} patches and this model's positions are "
                f"those of {self.grid[0]} x {self.grid[1]}: resize the images"
            )
        extra, patches = self.table.split([self.num_extra, self.grid[0] * self.grid[1]], dim=1)
        picture = patches.float().transpose(1, 2).unflatten(2, self.grid)
        resized = F.interpolate(picture, grid, mode="bicubic", align_corners=False)
        return torch.cat([extra, resized.flatten(2).transpose(1, 2).to(extra.dtype)], dim=1)
