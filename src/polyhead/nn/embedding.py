"""Learned tables: a vector for each token, position or distance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Table(nn.Module):
    """Rows of learned vectors `[rows, width]`, looked up by index; drawn with std 0.02."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        weight = torch.empty(num_rows, width)
        # Drawing on the meta device would import torch's compiler: two seconds for nothing.
        self.weight = nn.Parameter(weight if weight.is_meta else weight.normal_(std=0.02))

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class TokenEmbedding(Table):
    """A vector for each token id, times `scale`: `[B, T]` to `[B, T, E]`.

    Vectors `[B, T, E]` in the place of ids, as of images among a text, pass as they are.
    An id outside `[0, vocab_size)` raises ValueError on the CPU, where looking costs nothing.
    """

    def __init__(self, vocab_size: int, d_model: int, scale: float = 1.0) -> None:
        super().__init__(vocab_size, d_model)
        self.vocab_size = vocab_size
        self.scale = scale

    def forward(self, index: Tensor) -> Tensor:
        if not isinstance(index, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"input_ids are a {type(index).__name__}; pass a tensor [batch, tokens]"
            )
        if index.dim() == 3 and index.is_floating_point():
            return index
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(index)
        x = super().forward(index)
        return x if self.scale == 1.0 else x * self.scale

    def _check(self, input_ids: Tensor) -> None:
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
                "pass integers of shape [batch, tokens]"
            )
        if input_ids.numel() == 0:
            raise ValueError(f"input_ids of shape {list(input_ids.shape)} hold no tokens")
        low, high = (int(end) for end in input_ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size}; does the tokenizer belong to this model?"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"
