"""What a model is called with, and what of its answer is asked for.

B rows, T tokens, V vocabulary or classes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.mode import evaluating

Inputs = Tensor | Mapping[str, Tensor]
"""Token ids `[B, T]` or images `[B, C, h, w]`, or what the model is called with by name."""
Target = Callable[[Tensor], Tensor]
"""What is asked of an answer: logits to a number for each row `[B]`."""


def call(model: TaskModel, inputs: Inputs) -> Tensor:
    """The model's answer, nothing dropped out."""
    with evaluating(model):
        return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def token_ids(inputs: Inputs) -> Tensor:
    """The ids `[B, T]` of the texts, a decoder's of an encoder-decoder's too where it is asked."""
    if isinstance(inputs, Tensor):
        return inputs
    if "input_ids" not in inputs:
        raise ConfigError(f"inputs name {', '.join(inputs)} and no input_ids; this needs texts")
    return inputs["input_ids"]


def counted_tokens(inputs: Inputs) -> Tensor:
    """Which tokens `[B, T]` are no padding."""
    ids = token_ids(inputs)
    mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def logit(of: int | Tensor | None = None, at: int = -1) -> Target:
    """The logit of a class, or of an id after the token `at`; None: of the likeliest one.

    of: one for all rows, or `[B]`.
    """

    def target(logits: Tensor) -> Tensor:
        logits = logits[:, at] if logits.dim() == 3 else logits
        chosen = logits.detach().argmax(-1) if of is None else torch.as_tensor(of).to(logits.device)
        return logits.gather(-1, chosen.expand(len(logits))[:, None])[:, 0]

    return target
