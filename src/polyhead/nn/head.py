"""What turns hidden states into answers. C classes, V vocabulary."""

import torch
from torch import Tensor, nn

from polyhead.nn.dropout import Dropout
from polyhead.nn.embedding import Table
from polyhead.nn.feedforward import activation_named
from polyhead.nn.norm import LayerNorm


class Head(nn.Module):
    """Takes hidden states `[B, T, E]`, or what a head says here that it wants.

    reads:        the backbone's method that makes them; `forward` unless another.
    reads_pooled: the pooler's vector `[B, E]` in their place.
    needs_mask:   the attention mask `[B, T]` as a second argument, or None.
    """

    reads = "forward"
    reads_pooled = False
    needs_mask = False


class LanguageHead(nn.Linear, Head):
    """A logit for each token of the vocabulary: `[..., E]` to `[..., V]`.

    Tied to an embedding, its weight is the embedding's. `scale` multiplies the logits.
    """

    def __init__(
        self, d_model: int, vocab_size: int, *, bias: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__(d_model, vocab_size, bias=bias)
        self.scale = scale

    def tie(self, embedding: Table) -> None:
        """Share the embedding's weight from here on."""
        self.weight = embedding.weight

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        return logits if self.scale == 1.0 else logits * self.scale


class MaskedLanguageHead(Head):
    """Dense, activation and norm before the vocabulary (Devlin et al. 2019): `[..., V]`.

    width: of the dense layer's output where the embedding is narrower than the model (ALBERT).
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        activation: str = "gelu",
        norm_eps: float = 1e-12,
        width: int | None = None,
    ) -> None:
        super().__init__()
        width = d_model if width is None else width
        self.activation = activation_named(activation)
        self.dense = nn.Linear(d_model, width)
        self.norm = LayerNorm(width, norm_eps)
        self.decoder = LanguageHead(width, vocab_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))

    def transform(self, hidden: Tensor) -> Tensor:
        """What the decoder reads, `[..., width]`."""
        return self.norm(self.activation(self.dense(hidden)))


class Pooler(nn.Module):
    """One vector a text, from its first token: `[B, T, E]` to `[B, E]`."""

    def __init__(self, d_model: int, activation: str = "tanh", dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = torch.tanh if activation == "tanh" else activation_named(activation)
        self.dropout = Dropout(dropout)
        self.dense = nn.Linear(d_model, d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(self.dropout(hidden[:, 0])))


class Classifier(Head):
    """A logit for each class: of every token `[B, T, C]`, or of the pooled text `[B, C]`."""

    def __init__(
        self,
        width: int,
        num_labels: int,
        dropout: float = 0.0,
        *,
        pooled: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.reads_pooled = pooled
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(hidden))


class FirstTokenClassifier(Head):
    """Dense, activation and classifier on the first token: `[B, T, E]` to `[B, C]`."""

    def __init__(
        self, d_model: int, num_labels: int, activation: str = "tanh", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pooler = Pooler(d_model, activation, dropout)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pooler(hidden)))


class LastTokenClassifier(Head):
    """A logit for each class, from each row's last token that counts: `[B, C]`."""

    needs_mask = True

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(d_model, num_labels, bias=False)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.classifier(last_token(hidden, attention_mask))


class SpanHead(Head):
    """Logits of an answer's first and last token: `[B, T, E]` to `[B, T, 2]`."""

    def __init__(self, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.ends = nn.Linear(d_model, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ends(self.dropout(hidden))


class Heads(nn.ModuleDict):
    """Several heads on one backbone, each by its name; the first is asked unless one is named."""

    def pick(self, name: str | None) -> Head:
        """One of the heads; raises ValueError for a name that none has."""
        name = next(iter(self)) if name is None else name
        if name not in self:
            raise ValueError(f"there is no head {name!r}; there are {', '.join(self)}")
        head = self[name]
        assert isinstance(head, Head)
        return head


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Each row's last token that counts, `[B, E]`."""
    if attention_mask is None:
        return hidden[:, -1]
    slots = torch.arange(hidden.shape[1], device=hidden.device)
    last = (slots * (attention_mask != 0)).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
