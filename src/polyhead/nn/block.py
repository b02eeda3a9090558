"""The transformer block: attention and feed-forward, each with a residual and a norm."""

from collections.abc import Callable

from torch import Tensor, nn

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Cache
from polyhead.nn.dropout import Dropout
from polyhead.nn.mask import Lowered, Mask
from polyhead.nn.position import Position


class TransformerBlock(nn.Module):
    """Pre-norm: each part sees the normed input and adds to it (Xiong et al. 2020).

    `cross`, if given, attends to a memory between the two. `norm` makes each of the norms.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        ffn: nn.Module,
        norm: Callable[[], nn.Module],
        cross: MultiHeadAttention | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = norm()
        self.attention = attention
        if cross is not None:
            self.cross_norm = norm()
        self.cross = cross
        self.ffn_norm = norm()
        self.ffn = ffn
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Mask | Lowered | None = None,
        position: Position | None = None,
        at: Tensor | None = None,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        memory_mask: Mask | Lowered | None = None,
        memory_cache: Cache | None = None,
    ) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`; the arguments are those of attention."""
        attended = self.attention(
            self.attention_norm(x), mask=mask, position=position, at=at, cache=cache
        )
        x = x + self.dropout(attended)
        if self.cross is not None:
            found = self.cross(
                self.cross_norm(x), memory=memory, mask=memory_mask, at=at, cache=memory_cache
            )
            x = x + self.dropout(found)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class PostNormBlock(TransformerBlock):
    """Post-norm, as in 2017: the norm follows the sum of a part and its input."""

    def forward(
        self,
        x: Tensor,
        mask: Mask | Lowered | None = None,
        position: Position | None = None,
        at: Tensor | None = None,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        memory_mask: Mask | Lowered | None = None,
        memory_cache: Cache | None = None,
    ) -> Tensor:
        """`[B, T, E]` to `[B, T, E]`; the arguments are those of attention."""
        attended = self.attention(x, mask=mask, position=position, at=at, cache=cache)
        x = self.attention_norm(x + self.dropout(attended))
        if self.cross is not None:
            found = self.cross(x, memory=memory, mask=memory_mask, at=at, cache=memory_cache)
            x = self.cross_norm(x + self.dropout(found))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))
