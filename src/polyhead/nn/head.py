"""What turns hidden states into answers."""

from torch import Tensor, nn

from polyhead.nn.embedding import TokenEmbedding


class LanguageHead(nn.Linear):
    """A logit for each token of the vocabulary: `[..., E]` to `[..., V]`.

    Tied to an embedding, its weight is the embedding's. `scale` multiplies the logits.
    """

    def __init__(
        self, d_model: int, vocab_size: int, *, bias: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__(d_model, vocab_size, bias=bias)
        self.scale = scale

    def tie(self, embedding: TokenEmbedding) -> None:
        """Share the embedding's weight from here on."""
        self.weight = embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        return logits if self.scale == 1.0 else logits * self.scale
