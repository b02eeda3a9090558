"""A built model whose every part can be written as one graph for all sizes: surgery on a copy.

The doubles give what their parts give. What a part does in Python for the sizes at hand becomes
arithmetic on tensors or a table that is read.
"""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.model import BESIDE, TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.disentangled import Disentangled, DisentangledAttention, distance_rows
from polyhead.nn.moe import MixtureOfExperts
from polyhead.nn.position import Position, T5Bias
from polyhead.nn.probe import Probe
from polyhead.nn.rotary import DynamicRotary
from polyhead.nn.sharing import with_same_weights


def exportable(model: TaskModel, *, fused: bool = False) -> TaskModel:
    """A copy of `model` that can be traced; the weights are shared with it.

    fused: attention stays torch's fused kernel; else it is the definition, products and a softmax,
    which every runtime knows. Errors: ConfigError for a model in few bits, packed for one machine,
    with adapters, or whose graph depends on how long a text is.
    """
    _check(model)
    found = with_same_weights(model)
    for part in list(found.modules()):
        for name, child in list(part.named_children()):
            if double := DOUBLES.get(type(child)):
                setattr(part, name, double.of(child))
        if isinstance(part, MultiHeadAttention):
            # A probed layer takes the explicit path.
            part.probes = [] if fused else [Probe()]
    return found


def in_float32(model: TaskModel) -> TaskModel:
    """The model, or where it is in another type a copy."""
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def _check(model: TaskModel) -> None:
    for name, part in model.named_modules():
        if f".{BESIDE}." in name:
            raise ConfigError("the model has adapters; merge them (merge_adapters) and export that")
        if hasattr(part, "packed"):
            raise ConfigError("the model is in few bits; export the one that it was made from")
        if type(part).__module__.startswith("polyhead.kernels"):
            raise ConfigError("the model is packed for this machine; export the one before")
        if isinstance(part, nn.LSTM):
            raise ConfigError(
                "an lstm reads token by token, which no one graph says for all lengths; "
                "export a model with attention"
            )
        if isinstance(part, DynamicRotary):
            raise ConfigError(
                "rope scaling 'dynamic' turns with the length of each text, which no one graph "
                "says; use the model where Polyhead or transformers runs"
            )


class TabledBias(T5Bias):
    """T5's buckets read from a table: a logarithm elsewhere may round to the next bucket."""

    bucket_of: Tensor

    @classmethod
    def of(cls, part: T5Bias) -> Self:
        """The same table of biases."""
        double = cls.__new__(cls)
        double.__dict__ = part.__dict__
        reach = torch.arange(-part.max_distance, part.max_distance + 1)
        double.register_buffer("bucket_of", part.buckets(reach), persistent=False)
        return double

    def buckets(self, distance: Tensor) -> Tensor:
        """Beyond `max_distance` all are as there."""
        most = self.max_distance
        return self.bucket_of[distance.clamp(-most, most) + most]


class TabledDistances(Disentangled):
    """DeBERTa's distances for any length: all rows projected, and those of each pair gathered."""

    row_of: Tensor

    @classmethod
    def of(cls, part: Disentangled) -> Self:
        """The same table of vectors."""
        double = cls.__new__(cls)
        double.__dict__ = part.__dict__
        # As far as rows still differ: a scale of buckets ends at `max_distance`, or a bit above.
        reach = part.span if part.buckets is None else part.span + 2 * part.max_distance
        rows = distance_rows(reach + 1, part.span, part.buckets, part.max_distance)
        double.register_buffer("row_of", rows, persistent=False)
        return double

    def prepare(self, at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> Position:
        most = len(self.row_of) // 2
        places = torch.arange(at.shape[1], device=at.device)
        distances = (places[:, None] - places).clamp(-most, most)
        return Gathered(self.norm(self.table.weight), self.row_of[distances + most])


class Gathered(Position):
    """The vectors `[R, E]`, and the row `[T, T]` of each query and key."""

    def __init__(self, vectors: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.vectors, self.rows = vectors, rows

    def bias(
        self, q: Tensor, k: Tensor, at: Tensor, keys_at: Tensor, attention: MultiHeadAttention
    ) -> Tensor | None:
        assert isinstance(attention, DisentangledAttention)
        keys, queries = attention.keys_of(self.vectors), attention.queries_of(self.vectors)
        found = None
        if keys is not None:
            found = self._scores(q, keys, self.rows)
        if queries is not None:
            seen = self._scores(k, queries, self.rows.T).transpose(2, 3)
            found = seen if found is None else found + seen
        return None if found is None else found * attention.scale

    def _scores(self, x: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
        """Each place's product with the vector of each other's distance, `[B, H, T, T]`."""
        by_head = vectors.unflatten(1, (x.shape[1], -1)).permute(1, 2, 0)
        return (x @ by_head).gather(-1, rows.expand(*x.shape[:2], -1, -1))


class LoopedExperts(MixtureOfExperts):
    """Experts one after the other, each with the tokens that chose it, however many."""

    @classmethod
    def of(cls, part: MixtureOfExperts) -> Self:
        """The same weights, seen expert by expert."""
        double = cls.__new__(cls)
        double.__dict__ = part.__dict__
        experts = part.experts
        for name in ("gate", "up", "down"):
            own = [nn.Parameter(weight, False) for weight in getattr(experts, name).unbind()]
            setattr(double, f"{name}s", nn.ParameterList(own))
        double.activation = experts.activation
        del double.experts
        return double

    def _mix(self, tokens: Tensor) -> Tensor:
        probabilities = self.router(tokens).float().softmax(-1)
        chosen, experts = probabilities.topk(self.top_k, dim=-1)  # [tokens, k]
        if self.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            mine = experts == expert
            rows = mine.any(-1).nonzero().squeeze(-1)
            x = tokens[rows]
            wide = self.activation(x @ self.gates[expert].T) * (x @ self.ups[expert].T)
            share = (chosen * mine).sum(-1)[rows, None].to(x.dtype)
            mixed = mixed.index_add(0, rows, wide @ self.downs[expert].T * share)
        return mixed


DOUBLES: dict[type[nn.Module], Any] = {
    T5Bias: TabledBias,
    Disentangled: TabledDistances,
    MixtureOfExperts: LoopedExperts,
}
"""What takes the place of which part."""
