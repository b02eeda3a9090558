"""Classifier-free guidance: away from what the model would write after another prompt."""

from torch import Tensor


def guide(logits: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """negative + scale × (logits - negative), of log-probabilities (Sanchez et al. 2023).

    logits, negative `[N, V]`: after the prompt, and after what the text shall lead away from;
    scale `[N]`, 1 for no guidance.
    """
    wanted, away = logits.log_softmax(1), negative.log_softmax(1)
    return scale[:, None] * (wanted - away) + away
