"""Models that hold the same weights."""

import copy
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_same_weights(model: M) -> M:
    """A copy to be changed: its weights lie where the model's lie, and do not learn.

    It is in evaluation. Replace a weight's `data`; what is written into it is the model's, too.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo).eval()
