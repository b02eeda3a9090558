"""What stands on CLIP's towers. P the width of the space that texts and images share."""

import torch
from torch import Tensor, nn

from polyhead.nn.head import Head
from polyhead.nn.norm import LayerNorm


class ClassTokenNorm(nn.Module):
    """The class token, normed: `[B, T, E]` to `[B, E]`."""

    def __init__(self, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model, norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden[:, 0])


class Projection(Head):
    """The vector of a text or of an image in the shared space: `[B, E]` to `[B, P]`."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(d_model, width, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.projection(pooled)


class ImageProjection(Projection):
    """Of what the pooler makes of an image."""

    reads_pooled = True


class TextProjection(Projection):
    """Of a text's state at its end."""

    reads = "pooled"


class Similarity(Head):
    """Cosines `[texts, images]` over a learned temperature, kept as the scale's logarithm."""

    def __init__(self, log_scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def forward(self, cosines: Tensor) -> Tensor:
        return cosines * self.log_scale.exp()
