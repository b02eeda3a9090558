"""Attention of image models laid back over the image.

B images, H heads, h × w the grid of patches, n windows a grid, M a window's edge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain.capture import capture
from polyhead.models.model import TaskModel
from polyhead.models.swin import Swin, SwinStage
from polyhead.nn.mode import evaluating
from polyhead.nn.patches import Grid, PatchEmbedding
from polyhead.nn.windows import Windows


@torch.no_grad()
def image_maps(
    model: TaskModel, pixel_values: Tensor, query: Grid | None = None, where: str = "*"
) -> dict[str, Tensor]:
    """What each head looks at, by layer: `[B, H, h, w]`, a share of the weight for each patch.

    Of CLIP and LLaVA they are those of the tower that reads images.
    query: the patch (row, column) that looks; None: the class token, or where there is none (Swin)
    all patches together, in the mean. Of Swin's layers a query sees its window alone; patches
    outside it are zero, and what falls on a window's padding is missing. A patch is one of the
    layer's own grid. ConfigError for a model that reads no image, and a patch off the grid.
    """
    named = ((n, p) for n, p in model.named_modules() if isinstance(p, PatchEmbedding))
    patches_at, patches = next(named, ("", None))
    if patches is None:
        raise ConfigError(f"{model.config.model_type} reads no images; capture its weights instead")
    tower = patches_at.rpartition(".")[0]
    with capture(model, where if where != "*" else f"{tower}.*") as seen, evaluating(model):
        model.get_submodule(tower)(pixel_values)
    grid = patches.grid(pixel_values)
    if isinstance(model.backbone, Swin):
        return {name: _of_windows(model, name, w, grid, query) for name, w in seen.items()}
    return {name: _of_patches(weights, grid, query) for name, weights in seen.items()}


def over_image(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps `[..., h, w]` as large as the image, smoothed: `[..., height, width]`."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    size = (height, width)
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(
        *maps.shape[:-2], height, width
    )


def _of_patches(weights: Tensor, grid: Grid, query: Grid | None) -> Tensor:
    """Of a ViT: what stands before the patches (class and distillation tokens) is left out."""
    before = weights.shape[-1] - grid[0] * grid[1]
    row = 0 if query is None else before + _index(query, grid)
    if query is None and not before:
        return weights.mean(2).unflatten(-1, grid)
    return weights[:, :, row, before:].unflatten(-1, grid)


def windows_of(model: TaskModel, name: str, weights: Tensor, grid: Grid) -> Windows:
    """How a Swin's layer cut the grid of its stage; weights: its own, `[B n, H, M², M²]`."""
    path = name.split(".")
    stage_number, layer = int(path[path.index("stages") + 1]), int(path[path.index("layers") + 1])
    stage = model.backbone.get_submodule(f"stages.{stage_number}")
    assert isinstance(stage, SwinStage)
    is_small = min(grid) <= stage.edge
    edge = min(grid) if is_small else stage.edge
    shift = stage.edge // 2 if layer % 2 and not is_small else 0
    count = -(-grid[0] // edge) * -(-grid[1] // edge)
    like = torch.zeros(len(weights) // count, grid[0] * grid[1], 1, device=weights.device)
    return Windows.of(like, grid, edge, shift)


def stage_grid(grid: Grid, stage: int) -> Grid:
    """The grid of a Swin's stage: each further one halves it."""
    for _ in range(stage):
        grid = -(-grid[0] // 2), -(-grid[1] // 2)
    return grid


def _of_windows(
    model: TaskModel, name: str, weights: Tensor, grid: Grid, query: Grid | None
) -> Tensor:
    """Of a Swin: windows `[B n, H, M², M²]` joined to the grid of their stage."""
    path = name.split(".")
    grid = stage_grid(grid, int(path[path.index("stages") + 1]))
    windows = windows_of(model, name, weights, grid)
    edge, count = windows.edge, len(weights) // windows.num_images
    if query is None:
        if windows.filled is not None:
            asks = windows.filled.view(count, 1, -1, 1).repeat(windows.num_images, 1, 1, 1)
            weights = weights * asks
        given = weights.sum(2) / (grid[0] * grid[1])
    else:
        place = windows.places[_index(query, grid)]
        window, row = int(place) // edge**2, int(place) % edge**2
        given = torch.zeros_like(weights[:, :, 0])
        given[window::count] = weights[window::count, :, row]
    found = windows.join(given.transpose(1, 2).contiguous())
    return found.transpose(1, 2).unflatten(-1, grid)


def _index(query: Grid, grid: Grid) -> int:
    if not all(0 <= at < size for at, size in zip(query, grid, strict=True)):
        raise ConfigError(f"patch {query} of a grid of {grid[0]} x {grid[1]}; count from 0")
    return query[0] * grid[1] + query[1]
