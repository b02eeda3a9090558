"""Layers that see the same inputs, as queries, keys and values do, multiplied as one."""

from collections.abc import Sequence

from torch import Tensor, nn

from polyhead.compress.layers import PackedLinear
from polyhead.kernels.products import LaidOut


class Joined:
    """Linear layers whose weights in few bits lie one after the other: inputs are rounded once.

    Layers stay what they were; their weights and biases are views of what is read here.
    """

    def __init__(self, layers: Sequence[PackedLinear], whole: LaidOut) -> None:
        self.whole, self.widths = whole, [layer.out_features for layer in layers]
        self.bias = _one_bias(layers)
        self._before = [_state(layer) for layer in layers]

    @staticmethod
    def of(layers: Sequence[nn.Module]) -> "Joined | None":
        """Layers as one; None where the kernels do not take them so."""
        linear = [layer for layer in layers if isinstance(layer, PackedLinear)]
        weights = [layer.packed for layer in linear if isinstance(layer.packed, LaidOut)]
        if len(weights) < len(layers):
            return None
        whole = weights[0].with_others(weights[1:])
        return None if whole is None else Joined(linear, whole)

    def __call__(self, x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...] | None:
        """What each layer makes of x; None where one of them is another now, is watched, or x
        learns."""
        if x.requires_grad or any(map(_is_changed, layers, self._before)):
            return None
        found = self.whole.times(x, bias=self.bias)
        return None if found is None else found.split(self.widths, -1)


def _one_bias(layers: Sequence[PackedLinear]) -> Tensor | None:
    """The biases one after the other, zeros for those that are none; they become views of it."""
    like = next((layer.bias for layer in layers if layer.bias is not None), None)
    if like is None:
        return None
    widths = [layer.out_features for layer in layers]
    whole = like.new_zeros(sum(widths))
    for layer, part in zip(layers, whole.split(widths), strict=True):
        if layer.bias is not None:
            part.copy_(layer.bias.detach())
            layer.bias = nn.Parameter(part, requires_grad=False)
    return whole


def _state(layer: nn.Module) -> tuple[object, ...]:
    """What a layer computes by."""
    return layer, type(layer), layer._modules.get("packed"), layer._parameters.get("bias")


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody looks at a layer's answers, or gives them in its place."""
    own = vars(layer)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _is_changed(layer: nn.Module, before: tuple[object, ...]) -> bool:
    now = _state(layer)
    return is_watched(layer) or any(a is not b for a, b in zip(now, before, strict=True))
