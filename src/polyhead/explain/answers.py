"""What a model's head says of the residual stream before its end.

B rows, T tokens, E the model's width, V vocabulary.
"""

from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel


class Answers:
    """The head's answer to the stream as a block leaves it; the model's last norm comes first.

    last: the name of the last block. ConfigError for a model without a head.
    """

    def __init__(self, model: TaskModel, last: str) -> None:
        if model.head is None:
            raise ConfigError("a lens answers by the model's head, and it was loaded without one")
        kind = getattr(model.config, "kind", "")
        if not last or kind == "two towers":
            raise ConfigError(
                f"{model.config.model_type} has no stack of blocks whose states its head reads; a "
                "lens is of one with such a stack, as an encoder or a decoder"
            )
        self.model, self.last, self.norm = model, last, final_norm(model, last)

    def __call__(self, state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[B, T, E]` to logits `[B, T, V]`, or what the head answers."""
        try:
            normed = state if self.norm is None else self.norm(state)
            return self.model.answer(normed, attention_mask)
        except RuntimeError as error:
            raise ConfigError(
                f"states of width {state.shape[-1]} are not what the head reads; look at the "
                f"blocks of the last stage, such as {self.last}"
            ) from error


def final_norm(model: nn.Module, last: str) -> nn.Module | None:
    """The norm between the last block and the head; None where there is none."""
    place = last
    while place:
        place = place.rpartition(".")[0]
        found = getattr(model.get_submodule(place), "norm", None) if place else None
        if isinstance(found, nn.Module):
            return found
    return None


def stack_of(block: str) -> str:
    """What the names of a block's stack begin with, as `backbone.decoder.layers.`."""
    while block.rpartition(".")[2].isdigit():
        block = block.rpartition(".")[0]
    return f"{block}."
