"""What an adapter was made beside: a base model's weights, told apart by a digest."""

from collections.abc import Sequence
from hashlib import sha256

import torch

from polyhead.adapt.adapters import trained_parts
from polyhead.adapt.lora import adapted_layers
from polyhead.models.model import BESIDE, TaskModel

_AT_ONCE = 1 << 24  # weights


def base_digest(model: TaskModel, trained: Sequence[str] = ()) -> str:
    """SHA-256 of a backbone's weights as they are without adapters, merged or not.

    trained: parts that learn with the adapter, and do not count. Taken of the values in bfloat16,
    so that a model loaded as float32 or bfloat16 has the same.
    """
    moving = tuple(f"{name}." for name, _ in trained_parts(model, trained))
    merged = {f"{name}.weight": layer.merged for name, layer in adapted_layers(model)}
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if f".{BESIDE}." in name or name.startswith(moving) or not name.startswith("backbone."):
            continue
        before = merged.get(name)
        weight = (tensor if before is None else before).detach()
        found.update(f"{name} {list(weight.shape)}".encode())
        for part in weight.reshape(-1).split(_AT_ONCE):
            found.update(part.to("cpu", torch.bfloat16).view(torch.int16).numpy().data)
    return found.hexdigest()
