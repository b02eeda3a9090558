"""The parts of image models against plain loops and torch's own layers."""

import pytest
import torch
import torch.nn.functional as F

from polyhead.nn.patches import PatchEmbedding, PatchPositions
from polyhead.nn.residual import DropPath, LayerScale
from polyhead.nn.windows import PatchMerging, WindowBias, Windows

GRIDS = [
    ((8, 8), 4, 0),
    ((8, 8), 4, 2),
    ((6, 9), 3, 1),
    ((5, 7), 3, 0),
    ((5, 7), 3, 1),
    ((4, 4), 4, 0),
]


def grid_tokens(grid: tuple[int, int], width: int = 3) -> torch.Tensor:
    return torch.randn(2, grid[0] * grid[1], width)


@pytest.mark.parametrize(("grid", "edge", "shift"), GRIDS)
def test_windows_are_those_of_a_rolled_image(grid: tuple[int, int], edge: int, shift: int) -> None:
    x = grid_tokens(grid)
    picture = F.pad(x.view(2, *grid, 3), (0, 0, 0, -grid[1] % edge, 0, -grid[0] % edge))
    picture = picture.roll((-shift, -shift), (1, 2))
    expected = [
        picture[image, row : row + edge, column : column + edge].flatten(0, 1)
        for image in range(2)
        for row in range(0, picture.shape[1], edge)
        for column in range(0, picture.shape[2], edge)
    ]
    windows = Windows.of(x, grid, edge, shift)
    assert torch.equal(windows.cut(x), torch.stack(expected))
    assert torch.equal(windows.join(windows.cut(x)), x)


@pytest.mark.parametrize(("grid", "edge", "shift"), [case for case in GRIDS if case[2]])
def test_places_see_each_other_only_where_they_were_neighbours(
    grid: tuple[int, int], edge: int, shift: int
) -> None:
    """In a shifted window, those that the roll brought from the other side stand apart."""
    x = grid_tokens(grid)
    height, width = (-(-side // edge) * edge for side in grid)
    windows = Windows.of(x, grid, edge, shift)
    where = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    rolled = where.roll((-shift, -shift), (1, 2))
    hidden = windows.hidden[:, 0]
    number = 0
    for top in range(0, height, edge):
        for left in range(0, width, edge):
            at = rolled[:, top : top + edge, left : left + edge].flatten(1)
            near = ((at[:, :, None] - at[:, None, :]).abs() < edge).all(0)
            assert torch.equal(hidden[number] == 0, near)
            number += 1
    assert number == len(hidden)


def test_a_bias_depends_on_the_offset_alone() -> None:
    part = WindowBias(num_heads=2, edge=3)
    biases = part.biases(3)[0]
    for q in range(9):
        for k in range(9):
            row, column = q // 3 - k // 3 + 2, q % 3 - k % 3 + 2
            assert torch.equal(biases[:, q, k], part.table[row * 5 + column])


def test_merging_puts_four_neighbours_side_by_side() -> None:
    part = PatchMerging(3)
    x = grid_tokens((3, 5))
    picture = F.pad(x.view(2, 3, 5, 3), (0, 0, 0, 1, 0, 1))
    rows = [
        torch.cat([picture[:, 2 * i + di, 2 * j + dj] for dj in (0, 1) for di in (0, 1)], -1)
        for i in range(2)
        for j in range(3)
    ]
    expected = part.reduction(part.norm(torch.stack(rows, 1)))
    assert (part(x, (3, 5)) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(("pads", "grid"), [(False, (2, 3)), (True, (3, 4))])
def test_patches_are_read_row_by_row(pads: bool, grid: tuple[int, int]) -> None:
    part = PatchEmbedding(2, 5, (4, 3), pads=pads)
    pixels = torch.randn(1, 2, 11, 10)
    padded = F.pad(pixels, (0, 2, 0, 1)) if pads else pixels
    weight = part.projection.weight.flatten(1)
    expected = [
        weight @ padded[0, :, 4 * i : 4 * i + 4, 3 * j : 3 * j + 3].flatten() + part.projection.bias
        for i in range(grid[0])
        for j in range(grid[1])
    ]
    assert part.grid(pixels) == grid
    assert (part(pixels)[0] - torch.stack(expected)).abs().max() <= 1e-5


def test_positions_are_resized_as_a_picture() -> None:
    part = PatchPositions(6, (3, 4), num_extra=2, resizes=True)
    assert part((3, 4)) is part.table
    found = part((5, 2))
    picture = part.table[:, 2:].view(1, 3, 4, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(picture, (5, 2), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 10, 6)
    assert torch.equal(found[:, :2], part.table[:, :2])
    assert (found[:, 2:] - expected).abs().max() <= 1e-6
    half = part.to(torch.bfloat16)
    assert half((5, 2)).dtype == torch.bfloat16


def test_a_scale_is_for_each_channel() -> None:
    part = LayerScale(4, 0.5)
    assert torch.equal(part(torch.ones(2, 3, 4)), torch.full((2, 3, 4), 0.5))


def test_paths_are_dropped_row_by_row_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = DropPath(0.25).train()(x)
    rows = y.flatten(1)
    assert torch.equal(rows.amin(1), rows.amax(1))
    assert rows[:, 0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert DropPath(0.25).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
