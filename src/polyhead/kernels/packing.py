"""A model made ready for inference on this CPU, its answers equal but for rounding."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.compress import layers
from polyhead.compress.formats import Int4, PackedWeight
from polyhead.errors import ConfigError
from polyhead.kernels import attend, norm, rotate
from polyhead.kernels.joined import Joined, is_watched
from polyhead.kernels.products import ENDINGS, LaidOut
from polyhead.models.model import TaskModel
from polyhead.nn.embedding import Table
from polyhead.nn.feedforward import ACTIVATIONS, Activation, FeedForward, GatedFeedForward
from polyhead.nn.head import LanguageHead
from polyhead.nn.sharing import with_same_weights

M = TypeVar("M", bound=nn.Module)

# oneDNN's names of what it applies to a product before that is written to memory.
FUSED: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    F.relu: ("relu", ""),
    F.gelu: ("gelu", "none"),
    ACTIVATIONS["gelu_tanh"]: ("gelu", "tanh"),
    F.silu: ("swish", ""),
    F.tanh: ("tanh", ""),
}
MANY = 64  # tokens, for which it pays to lay a weight out on the way
_DOUBLES = {**attend.DOUBLES, **norm.DOUBLES, **rotate.DOUBLES}


def pack(model: M) -> M:
    """A copy of `model` with weights laid out for this CPU's products; for inference alone.

    Linear layers become `PackedLinear`s, with the activation that follows in a feed-forward layer;
    matrices in int4 or int8 (`quantize`) are multiplied as they are, by activations in eight bits
    (in twice as many by the language head of a model in int8, whose own rounding is next to none);
    attention over up to 2048 keys, norms and rotations take kernels of our own where g++ is there;
    language heads, whose table is shared, are multiplied by oneDNN as they lie. What a machine or a
    dtype does not support stays as it is. The old model is untouched, and what is
    not packed is shared with it; drop it, and its linear layers' weights are freed. The new one
    saves and loads weights like the old, but is not trained, moved or cast: do that before.
    """
    packed = with_same_weights(model)
    is_fine = not any(isinstance(part, Int4) for part in packed.modules())
    for part in list(packed.modules()):
        if isinstance(part, FeedForward | GatedFeedForward):
            _fuse(part)
        for name, child in list(part.named_children()):
            if isinstance(child, PackedWeight):
                rounds_twice = is_fine and isinstance(part, LanguageHead | Table)
                setattr(part, name, LaidOut.of(child, rounds_twice) or child)
            if type(child) is layers.PackedLinear:
                setattr(part, name, _as(LaidOutLinear, child))
            if type(child) is nn.Linear and PackedLinear.takes(child.weight):
                setattr(part, name, PackedLinear(child))
            elif type(child) is LanguageHead and PackedLinear.takes(child.weight):
                setattr(part, name, _as(ManyTokensHead, child))
            elif double := _DOUBLES.get(type(child)):
                setattr(part, name, _as(double, child))
    for part in packed.modules():
        if isinstance(part, attend.FusedAttention):
            part.joined = Joined.of((part.q, part.k, part.v))
        if type(part) is FeedForward and type(part.down) is LaidOutLinear:
            part.__class__ = LaidOutFeedForward
    if isinstance(packed, TaskModel):
        packed.inference_only = True
    return packed


def _as(double: type[M], part: nn.Module) -> M:
    """The same part, all that it holds included, of its faster class."""
    found = double.__new__(double)
    found.__dict__ = part.__dict__
    return found


def _fuse(part: FeedForward | GatedFeedForward) -> None:
    """The activation becomes part of the product that it follows."""
    name = "up" if isinstance(part, FeedForward) else "gate"
    before = getattr(part, name)
    if part.activation in ENDINGS and type(before) is layers.PackedLinear:
        after = _as(LaidOutLinear, before)
        after.activation, part.activation = part.activation, _same
        setattr(part, name, after)
    if part.activation in FUSED and type(before) is nn.Linear and PackedLinear.takes(before.weight):
        setattr(part, name, PackedLinear(before, *FUSED[part.activation]))
        part.activation = _same


def _same(x: Tensor) -> Tensor:
    return x


class LaidOutFeedForward(FeedForward):
    """`FeedForward` from few bits whose two products are one call, unless one is watched."""

    def forward(self, x: Tensor) -> Tensor:
        found = None
        up, down = self.up, self.down
        if type(up) is type(down) is LaidOutLinear and not (is_watched(up) or is_watched(down)):
            found = up.followed_by(down, x) if self.activation is _same else None
        return super().forward(x) if found is None else found


class LaidOutLinear(layers.PackedLinear):
    """`nn.Linear` from few bits whose kernel adds the bias and applies an activation, too."""

    activation: Activation | None = None

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.packed, LaidOut) and not input.requires_grad:
            found = self.packed.times(input, bias=self.bias, activation=self.activation)
            if found is not None:
                return found
        y = super().forward(input)
        return y if self.activation is None else self.activation(y)

    def followed_by(self, other: "LaidOutLinear", input: Tensor) -> Tensor | None:
        """What another layer makes of this one's answer; None where no kernel does both."""
        matrices = self.packed, other.packed
        if input.requires_grad or not all(isinstance(matrix, LaidOut) for matrix in matrices):
            return None
        first, second = cast(tuple[LaidOut, LaidOut], matrices)
        return first.then_times(input, second, (self.bias, other.bias), self.activation)


class PackedLinear(nn.Module):
    """`nn.Linear` whose weight lies as oneDNN multiplies it, with an activation after it.

    `weight` is opaque; `state_dict` gives it as it was. activation, how: of `FUSED`.
    """

    def __init__(self, linear: nn.Linear, activation: str = "none", how: str = "") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation, self.how = activation, how
        self.weight = _laid_out(linear.weight)
        self.bias = linear.bias

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether this machine has oneDNN's products of such a weight."""
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        is_half = weight.dtype == torch.bfloat16
        return weight.dtype == torch.float32 or (
            is_half and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.activation, [], self.how
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        before = torch.empty(0, dtype=self.weight.dtype)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ConfigError(
                f"a packed model stays on the CPU in {str(before.dtype).removeprefix('torch.')}; "
                "move or cast the model first, then pack it"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach().to_dense()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict and state_dict[key].shape == self.weight.shape:
            self.weight = _laid_out(state_dict[key].to("cpu", self.weight.dtype))
            state_dict = {**state_dict, key: self.weight}  # torch copies it onto itself
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation={self.activation}"


class ManyTokensHead(LanguageHead):
    """`LanguageHead`, by oneDNN where tokens are many: on AMD's CPUs torch's own products of
    float32 take up to three times as long."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() < MANY * input.shape[-1]:
            return super().forward(input)
        logits = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return logits if self.scale == 1.0 else logits * self.scale


def _laid_out(weight: Tensor) -> nn.Parameter:
    opaque = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return nn.Parameter(opaque, requires_grad=False)
