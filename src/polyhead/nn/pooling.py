"""From the hidden states of a text to one vector for it. P width of the vector."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.nn.head import Head, last_token

KINDS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class Pooling(Head):
    """One vector a text, over the tokens that count: `[B, T, E]` to `[B, P]`, fp32.

    kinds:     of `KINDS`, one after the other in the vector (Reimers and Gurevych 2019); the
               weighted mean counts a token by its position, from 1 (Muennighoff 2022).
    dense:     layers after it. normalize: to length 1.
    width:     only that many first numbers (Kusupati et al. 2022, Matryoshka), None: all.
    """

    needs_mask = True

    def __init__(
        self,
        kinds: Sequence[str] = ("mean",),
        dense: Sequence[nn.Module] = (),
        normalize: bool = True,
        width: int | None = None,
    ) -> None:
        super().__init__()
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"pooling is {kind!r}; use one of {', '.join(KINDS)}")
        self.kinds = tuple(kinds)
        self.dense = nn.ModuleList(dense)
        self.normalize = normalize
        self.width = width

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pooled = self.vectors(hidden, attention_mask)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def vectors(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same before it is made of length 1."""
        pooled = torch.cat([pool(hidden, attention_mask, kind) for kind in self.kinds], dim=-1)
        for layer in self.dense:
            pooled = layer(pooled.to(hidden.dtype)).float()
        return pooled[:, : self.width]

    def extra_repr(self) -> str:
        return f"{'+'.join(self.kinds)}, normalize={self.normalize}, width={self.width}"


class Activated(nn.Module):
    """A linear layer and what follows it: `[..., in]` to `[..., out]`."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


def pool(hidden: Tensor, attention_mask: Tensor | None, kind: str) -> Tensor:
    """`[B, E]` fp32 of hidden states `[B, T, E]`, by one of `KINDS`."""
    if kind == "lasttoken":
        return last_token(hidden, attention_mask).float()
    if attention_mask is None:
        attention_mask = torch.ones(hidden.shape[:2], device=hidden.device)
    keep = attention_mask != 0
    if kind == "cls":
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, keep.int().argmax(1)].float()
    if kind == "max":
        return hidden.masked_fill(~keep[:, :, None], float("-inf")).amax(1).float()
    weights = keep.float()
    if kind == "weightedmean":
        weights = weights * weights.cumsum(1)
    total = torch.einsum("bt,bte->be", weights, hidden.float())
    count = weights.sum(1, keepdim=True).clamp(min=1e-9)
    return total / (count.sqrt() if kind == "mean_sqrt_len_tokens" else count)
