"""Layers whose weights are kept in few bits and unpacked for the moment of a product.

They stand below the class of the layer that they take the place of, so that a head stays a head.
Gradients pass to the inputs, and to the steps of a weight where they learn; codes do not.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.compress.formats import PackedWeight
from polyhead.errors import ConfigError
from polyhead.files.digest import tensor_digest
from polyhead.models.model import BESIDE, TaskModel
from polyhead.nn.embedding import Table
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import Experts

EXPERT_WEIGHTS = ("gate", "up", "down")
Form = Callable[[Tensor], PackedWeight]
"""Makes of a matrix one in few bits."""
_ALL = slice(None)
_AT_ONCE = 1 << 22  # weights that are unpacked for a product: a layer's, not a vocabulary's


class _Product(torch.autograd.Function):
    """x wᵀ that remembers no unpacked weight, and x only where the weight's steps learn."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: PackedWeight, rows: slice, *learning: Tensor
    ) -> Tensor:
        ctx.weight, ctx.rows, ctx.learning = weight, rows, learning
        if learning:
            ctx.save_for_backward(x)
        return times(x, weight, rows)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not ctx.learning:
            return times_transposed(grad, ctx.weight, ctx.rows), None, None
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            unpacked = ctx.weight.unpack(ctx.rows)
        outer = grad.flatten(0, -2).mT @ x.flatten(0, -2)
        moves = torch.autograd.grad(unpacked, ctx.learning, outer)
        return grad @ unpacked.detach(), None, None, *moves


def product(x: Tensor, weight: PackedWeight, rows: slice = _ALL) -> Tensor:
    """x `[..., W]` by the rows of a packed matrix `[R, W]`: `[..., R]`."""
    return _Product.apply(x, weight, rows, *weight.learning)


def times(x: Tensor, weight: PackedWeight, rows: slice = _ALL) -> Tensor:
    """The product without its gradient. A large matrix, as of a vocabulary, is never whole."""
    found = weight.times(x, rows)
    if found is not None:
        return found
    stretches = _stretches(weight, rows)
    if len(stretches) == 1:
        return F.linear(x, weight.unpack(rows))
    start = stretches[0].start
    found = x.new_empty(*x.shape[:-1], stretches[-1].stop - start)
    for some in stretches:
        found[..., some.start - start : some.stop - start] = F.linear(x, weight.unpack(some))
    return found


def times_transposed(y: Tensor, weight: PackedWeight, rows: slice = _ALL) -> Tensor:
    """y `[..., R]` by the matrix's columns: `[..., W]`, summed over stretches in float32."""
    stretches = _stretches(weight, rows)
    if len(stretches) == 1:
        return y @ weight.unpack(rows)
    start, total = stretches[0].start, torch.zeros((), device=y.device)
    for some in stretches:
        total = total + y[..., some.start - start : some.stop - start] @ weight.unpack(some)
    return total.to(y.dtype)


def _stretches(weight: PackedWeight, rows: slice) -> list[slice]:
    """The rows, as many at a time as may be unpacked together."""
    start, stop, _ = rows.indices(weight.shape[0])
    some = max(1, _AT_ONCE // weight.shape[1])
    return [slice(at, min(at + some, stop)) for at in range(start, stop, some)] or [rows]


def packed_weight(layer: nn.Module) -> PackedWeight | None:
    """What a layer's product reads, where that is kept in few bits."""
    if isinstance(layer, TiedHead):
        return layer.embedding.packed
    return layer.packed if isinstance(layer, PackedLayer) else None


class PackedLayer(nn.Module):
    """`packed`: what is kept, `source_digest`: of the weight as it was, None where that is what
    it unpacks to."""

    packed: PackedWeight
    source_digest: str | None

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked; it does not learn."""
        return self.packed.unpack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` from few bits."""

    def forward(self, input: Tensor) -> Tensor:
        y = product(input, self.packed)
        return y if self.bias is None else y + self.bias


class PackedTable(PackedLayer, Table):
    """`Table` from few bits: only the rows that are looked up are unpacked."""

    def forward(self, index: Tensor) -> Tensor:
        rows = self.packed.unpack(index.flatten())
        return rows.view(*index.shape, rows.shape[1])

    def extra_repr(self) -> str:
        rows, width = self.packed.shape
        return f"{rows}, {width}"


class TiedHead(LanguageHead):
    """A head that reads a packed embedding, which it does not own."""

    embedding: PackedTable

    @property
    def weight(self) -> Tensor:
        """The embedding's, unpacked."""
        return self.embedding.weight

    def tie(self, embedding: Table) -> None:
        object.__setattr__(self, "embedding", embedding)

    def forward(self, input: Tensor) -> Tensor:
        logits = product(input, self.embedding.packed)
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.scale == 1.0 else logits * self.scale

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class PackedExperts(Experts):
    """`Experts` from few bits, one unpacked at a time. `of`: matrices `[N R, W]` by their names."""

    of: nn.ModuleDict
    num_experts: int
    source_digests: dict[str, str | None]

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        groups = x.split(counts.tolist())
        return torch.cat([self._one(group, e) for e, group in enumerate(groups) if len(group)])

    def _one(self, x: Tensor, expert: int) -> Tensor:
        gated = self.activation(self._by(x, "gate", expert)) * self._by(x, "up", expert)
        return self._by(gated, "down", expert)

    def _by(self, x: Tensor, name: str, expert: int) -> Tensor:
        packed: Any = self.of[name]
        rows = packed.shape[0] // self.num_experts
        return product(x, packed, slice(expert * rows, (expert + 1) * rows))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.of:
            destination[f"{prefix}{name}"] = self.unpack(name)

    def unpack(self, name: str) -> Tensor:
        """The weights of all experts `[N, R, W]`."""
        packed = self.of[name]
        assert isinstance(packed, PackedWeight)
        return packed.unpack().unflatten(0, (self.num_experts, -1))


@cache
def _below(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return base if kind is base.__mro__[2] else type(f"Packed{kind.__name__}", (kind, base), {})


def pack_layer(layer: nn.Module, form: Form) -> None:
    """Make a linear layer or a table one that keeps its weight in few bits."""
    weight: Any = layer.weight
    put_in_layer(layer, form(weight), tensor_digest(weight))


def put_in_layer(layer: nn.Module, packed: PackedWeight, digest: str | None = None) -> None:
    """Make a linear layer or a table one that keeps a matrix that is packed."""
    base = PackedLinear if isinstance(layer, nn.Linear) else PackedTable
    found: Any = layer
    del found._parameters["weight"]
    found.__class__ = _below(type(layer), base)
    found.packed, found.source_digest = packed, digest


def pack_experts(experts: Experts, form: Form) -> None:
    """Make experts ones that keep their weights in few bits."""
    weights = {name: getattr(experts, name) for name in EXPERT_WEIGHTS}
    packed = {name: form(weight.flatten(0, 1)) for name, weight in weights.items()}
    digests = {name: tensor_digest(weight) for name, weight in weights.items()}
    put_in_experts(experts, packed, digests)


def put_in_experts(
    experts: Experts,
    packed: Mapping[str, PackedWeight],
    digests: Mapping[str, str | None] | None = None,
) -> None:
    """Make experts ones that keep matrices `[N R, W]` that are packed, by their names."""
    found: Any = experts
    found.num_experts = len(experts.gate)
    for name in packed:
        del found._parameters[name]
    found.__class__ = PackedExperts
    found.of = nn.ModuleDict(packed)
    found.source_digests = dict(digests or dict.fromkeys(packed))


def tie_packed(head: LanguageHead, embedding: PackedTable) -> None:
    """Make a head read a packed embedding."""
    head._parameters.pop("weight", None)
    found: Any = head
    found.__class__ = TiedHead
    found.tie(embedding)


def tie_vocabulary(model: TaskModel) -> None:
    """Make tied heads read the embedding, where that is packed."""
    embedding = getattr(model.backbone, "embedding", None)
    if model.is_tied and isinstance(embedding, PackedTable):
        for head in language_heads(model):
            tie_packed(head, embedding)


def language_heads(model: TaskModel) -> list[LanguageHead]:
    """The heads over a vocabulary."""
    parts = [] if model.head is None else model.head.modules()
    return [part for part in parts if isinstance(part, LanguageHead)]


def check_floats(model: nn.Module, what: str = "pruned") -> None:
    """ConfigError for a model whose matrices are no plain floats, or have adapters beside them.

    what: it is not to be done to these.
    """
    if any(isinstance(part, PackedLayer | PackedExperts) for part in model.modules()):
        raise ConfigError(f"a model in few bits is not {what}: do that first, then quantize")
    if any(f".{BESIDE}." in name for name, _ in model.named_modules()):
        raise ConfigError(f"a model with adapters is not {what}: merge or remove them first")
