"""The heads that DeBERTa alone has."""

from torch import Tensor, nn

from polyhead.nn.dropout import Dropout
from polyhead.nn.feedforward import activation_named
from polyhead.nn.head import Head, MaskedLanguageHead
from polyhead.nn.norm import LayerNorm


class EnhancedMaskedHead(MaskedLanguageHead):
    """A masked-LM head that reads what the enhanced mask decoder makes (He et al. 2021, 3.2)."""

    reads = "decode_masked"


class ReplacedTokenHead(Head):
    """How surely each token was put in another's place: `[B, T, E]` to `[B, T]`.

    Each token is seen beside the first one (He et al. 2023, as in Microsoft's source).
    """

    def __init__(self, d_model: int, activation: str = "gelu", norm_eps: float = 1e-7) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.norm = LayerNorm(d_model, norm_eps)
        self.dense = nn.Linear(d_model, d_model)
        self.classifier = nn.Linear(d_model, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden + hidden[:, :1])
        return self.classifier(self.activation(self.dense(x))).squeeze(-1)


class ContextClassifier(Head):
    """Dense, activation and classifier on the first token: `[B, T, E]` to `[B, C]`.

    pooler_dropout: before the dense layer; dropout: before the classifier.
    """

    def __init__(
        self,
        d_model: int,
        num_labels: int,
        activation: str = "gelu",
        dropout: float = 0.0,
        pooler_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.pooler_dropout = Dropout(pooler_dropout)
        self.dense = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.activation(self.dense(self.pooler_dropout(hidden[:, 0])))
        return self.classifier(self.dropout(x))
