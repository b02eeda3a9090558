"""What an adapter was made beside: a base model's weights, told apart by a digest."""

from collections.abc import Iterator, Sequence
from hashlib import sha256

from torch import Tensor, nn

from polyhead.adapt.adapters import trained_parts
from polyhead.adapt.lora import adapted_layers
from polyhead.compress.layers import PackedExperts, PackedLayer
from polyhead.files.digest import tensor_digest
from polyhead.models.model import BESIDE, TaskModel


def base_digest(model: TaskModel, trained: Sequence[str] = ()) -> str:
    """A digest of a backbone's weights as they are without adapters, merged, in few bits or not.

    trained: parts that learn with the adapter, and do not count. Taken of the values in bfloat16,
    so that a model loaded as float32 or bfloat16 has the same.
    """
    moving = tuple(f"{name}." for name, _ in trained_parts(model, trained))
    merged = {f"{name}.weight": layer.merged for name, layer in adapted_layers(model)}
    found = sha256()
    for name, weight in sorted(_weights(model.backbone), key=lambda pair: pair[0]):
        if name.startswith(moving) or f".{BESIDE}." in name:
            continue
        before = merged.get(name)
        if not isinstance(weight, str):
            weight = tensor_digest(weight if before is None else before)
        found.update(f"{name} {weight}\n".encode())
    return found.hexdigest()


def _weights(backbone: nn.Module) -> Iterator[tuple[str, Tensor | str]]:
    """Every weight by its name; of one that was packed from floats the digest of these."""
    yield from backbone.named_parameters("backbone")
    for name, part in backbone.named_modules(prefix="backbone"):
        if isinstance(part, PackedLayer):
            yield f"{name}.weight", part.source_digest or part.weight
        elif isinstance(part, PackedExperts):
            for own, digest in part.source_digests.items():
                yield f"{name}.{own}", digest or part.unpack(own)
