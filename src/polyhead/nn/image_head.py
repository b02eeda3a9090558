"""What turns an image's tokens into answers. C classes."""

import torch
from torch import Tensor, nn

from polyhead.nn.feedforward import activation_named
from polyhead.nn.head import Head


class ClassTokenClassifier(Head):
    """A logit for each class, from the class token: `[B, T, E]` to `[B, C]`."""

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden[:, 0])


class DistilledClassifier(Head):
    """The mean of two classifiers, of the class and the distillation token: `[B, C]`."""

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(d_model, num_labels)
        self.distilled = nn.Linear(d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.classifier(hidden[:, 0]) + self.distilled(hidden[:, 1])) / 2


class ClassAndMeanClassifier(Head):
    """From the class token beside the mean of the patches: `[B, T, E]` to `[B, C]`."""

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(2 * d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=-1))


class MeanClassifier(Head):
    """A logit for each class, from the mean of all tokens: `[B, T, E]` to `[B, C]`."""

    def __init__(self, d_model: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(d_model, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden.mean(1))


class ImagePooler(nn.Module):
    """Dense and activation on the class token: `[B, T, E]` to `[B, width]`."""

    def __init__(self, d_model: int, width: int, activation: str = "tanh") -> None:
        super().__init__()
        self.activation = torch.tanh if activation == "tanh" else activation_named(activation)
        self.dense = nn.Linear(d_model, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.dense(hidden[:, 0]))
