"""A linear layer whose matrix is the product of two narrow ones."""

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`second(first(x))`, `[..., in]` to `[..., out]`, through `rank` numbers in between."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.out_features, self.rank = out_features, rank
        self.first = nn.Linear(in_features, rank, bias=False)
        self.second = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Tensor:
        """The product `[out, in]`."""
        return self.second.weight @ self.first.weight

    @property
    def bias(self) -> Tensor | None:
        """What is added, `[out]`."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
