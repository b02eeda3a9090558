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


def check_answers(of: Tensor, count: int) -> None:
    """ConfigError for an id or a class that there is not."""
    if bool(((of < 0) | (of >= count)).any()):
        raise ConfigError(f"of is {of.tolist()}, and the model has {count} answers; count from 0")


def check_differentiable(model: TaskModel) -> None:
    """ConfigError for a model whose kernels have no gradients."""
    if model.inference_only:
        raise ConfigError("a packed model has no gradients; ask the one that it was packed from")


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


def mask_of_answers(inputs: Inputs) -> Tensor | None:
    """Which tokens that are answered at count; None: all."""
    if isinstance(inputs, Tensor):
        return None
    is_read = "decoder_input_ids" in inputs
    return inputs.get("decoder_attention_mask" if is_read else "attention_mask")


def counted_place(keep: Tensor, at: int) -> Tensor:
    """Where the `at`-th token of each row that counts stands, from the end below 0: `[B]`.

    keep: `[B, T]`. Errors: ConfigError for a row that has no such token.
    """
    numbers = keep.int().cumsum(1)
    counts = numbers[:, -1:]
    wanted = counts + at + 1 if at < 0 else torch.full_like(counts, at + 1)
    if bool(((wanted < 1) | (wanted > counts)).any()):
        raise ConfigError(f"at is {at}, and a row has {int(counts.min())} tokens; count from 0")
    return (keep & (numbers == wanted)).int().argmax(1)


def logit(
    of: int | Tensor | None = None, at: int = -1, attention_mask: Tensor | None = None
) -> Target:
    """The logit of a class, or of an id after the token `at`; None: of the likeliest one.

    of: one for all rows, or `[B]`. attention_mask: `[B, T]`, so that `at` counts no padding.
    """

    def target(logits: Tensor) -> Tensor:
        if logits.dim() == 3:
            every = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            keep = every if attention_mask is None else attention_mask.bool().expand(every.shape)
            logits = logits[torch.arange(len(logits)), counted_place(keep, at)]
        chosen = logits.detach().argmax(-1) if of is None else torch.as_tensor(of).to(logits.device)
        check_answers(chosen, logits.shape[-1])
        return logits.gather(-1, chosen.expand(len(logits))[:, None])[:, 0]

    return target
