"""Tensor parallelism (Shoeybi et al. 2019): how the parts of a block are dealt out to ranks.

Rows of names and of what becomes of the part; the families' files know nothing of it. Of attention
each rank has some of the heads, of a feed-forward some of the F, also of every expert. Both end in
one sum over the ranks, and what lies between them is the same on all: norms, tables, heads.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from polyhead.adapt.lora import Adapted
from polyhead.compress.formats import PackedWeight
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Caches
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import Experts
from polyhead.nn.norm import RMSNorm
from polyhead.nn.position import Alibi, Position, PreparedBias, T5Bias
from polyhead.nn.rotary import Rotary, Rotation
from polyhead.nn.windows import WindowBias


class HeadNorm(ParallelStyle):
    """A norm of some of the heads `[B, T, H, D]`; a mean over all of them is one over ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def deal(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for own, weight in list(part.named_parameters(recurse=False)):
                _deal(part, own, mesh, Shard(0) if weight.ndim > 1 else Replicate())

        def enter(part: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False)

        def leave(part: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.redistribute(placements=[Shard(2)]).to_local()

        return distribute_module(module, device_mesh, deal, enter, leave)  # pyright: ignore[reportArgumentType]


class SplitExperts(ParallelStyle):
    """Stacked experts, each with some of its F: gate and up `[N, F, E]`, down `[N, E, F]`.

    Their products are chosen by what the router counts, which no DTensor can follow: they run on
    this rank's parts, and the sums of it are what is told the others.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
            _deal(module, name, device_mesh, Shard(dim))

        def enter(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            for name in ("gate", "up", "down"):
                # What stands here is found before the parameter of that name.
                part.__dict__[name] = part.get_parameter(name).to_local()  # pyright: ignore[reportAttributeAccessIssue]
            x, counts = inputs
            x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            # Each rank's gradient of x is of its own F.
            return x.to_local(grad_placements=[Partial()]), counts

        def leave(part: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            for name in ("gate", "up", "down"):
                del part.__dict__[name]
            whole = DTensor.from_local(output, device_mesh, [Partial()], run_check=False)
            return whole.redistribute(placements=[Replicate()]).to_local()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class SplitBias(ParallelStyle):
    """A position that adds to the scores of every head: of what it prepared, this rank's heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        part: Any = module
        prepare: Callable[..., PreparedBias] = part.prepare

        def own(at: Tensor, keys_at: Tensor, dtype: torch.dtype) -> PreparedBias:
            table = prepare(at, keys_at, dtype).table
            whole = DTensor.from_local(table, device_mesh, [Replicate()], run_check=False)
            return PreparedBias(whole.redistribute(placements=[Shard(1)]).to_local())

        part.prepare = own
        return module


@dataclass(frozen=True)
class Row:
    """What becomes of parts of some kinds whose names end so."""

    name: str
    kinds: tuple[type[nn.Module], ...]
    style: Callable[[], ParallelStyle]


_ALIKE = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}
_READERS = (MultiHeadAttention, FeedForward, GatedFeedForward)

PLAN = (
    # What several products read is told them once, so that its gradient is summed once.
    Row("attention|cross|ffn|shared", _READERS, lambda: PrepareModuleInput(**_ALIKE)),
    Row(r"(attention|cross)\.[qkv]", (nn.Linear,), ColwiseParallel),
    Row(r"(attention|cross)\.[qk]_norm", (RMSNorm,), HeadNorm),
    Row(r"(attention|cross)\.out", (nn.Linear,), RowwiseParallel),
    Row(r"(ffn|shared)\.(gate|up)", (nn.Linear,), ColwiseParallel),
    Row(r"(ffn|shared)\.down", (nn.Linear,), RowwiseParallel),
    Row(r"ffn\.experts", (Experts,), SplitExperts),
    Row("relative", (T5Bias, Alibi), SplitBias),
)

# They hold something of all heads or are made of it, and must have a row; these need none.
_OF_HEADS = (MultiHeadAttention, Position, WindowBias, Experts, Adapted, PackedWeight)
_ALREADY = (Rotary, Rotation, PreparedBias)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let the ranks of a mesh of one dimension hold and run the layers of a model together.

    Every rank has the whole model before, and calls it with the same input afterwards; the answers
    are those of one rank up to rounding. Errors: ConfigError where heads or F do not divide, and
    for a part that has no plan (DeBERTa's and Swin's attention, Shaw's positions, adapters).
    """
    rows = dict(_planned(model))
    for name, part in model.named_modules():
        _check(name, part, mesh.size(), planned=name in rows)
    if not rows:
        raise ConfigError("tensor parallelism finds nothing to split in this model: use fsdp")
    parallelize_module(model, mesh, {name: row.style() for name, row in rows.items()})
    makers = [part for part in model.modules() if hasattr(part, "make_caches")]
    if makers:  # the innermost, which the others ask
        _fewer_heads(makers[-1], mesh.size())


def _planned(model: nn.Module) -> Iterator[tuple[str, Row]]:
    for name, part in model.named_modules():
        for row in PLAN:
            # Of exactly these kinds: another attention may do something else by the same names.
            if type(part) in row.kinds and re.search(rf"(^|\.)({row.name})$", name):
                yield name, row


def _check(name: str, part: nn.Module, ranks: int, planned: bool) -> None:
    if isinstance(part, _OF_HEADS) and not planned and not isinstance(part, _ALREADY):
        raise ConfigError(
            f"tensor parallelism has no plan for {name} ({type(part).__name__}): use fsdp alone"
        )
    sizes: dict[str, int] = {}
    if isinstance(part, MultiHeadAttention):
        sizes = {"num_heads": part.num_heads, "num_kv_heads": part.num_kv_heads}
    elif isinstance(part, FeedForward | GatedFeedForward):
        sizes = {"d_ff": part.up.out_features}
    elif isinstance(part, Experts):
        sizes = {"d_ff": part.up.shape[1]}
    for what, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"{name}: {what} is {size}, which {ranks} ranks cannot share evenly: choose a "
                "tensor that divides it"
            )


def _fewer_heads(backbone: Any, ranks: int) -> None:
    """Caches that hold what this rank's heads give."""
    make = backbone.make_caches

    def own(*given: Any, **named: Any) -> Caches:
        caches: Caches = make(*given, **named)
        for cache in caches:
            cache.k, cache.v = (
                x.narrow(1, 0, x.shape[1] // ranks).clone() for x in (cache.k, cache.v)
            )
        return caches

    backbone.make_caches = own


def _deal(part: nn.Module, name: str, mesh: DeviceMesh, how: Replicate | Shard) -> None:
    """Make a parameter one of the ranks of a mesh."""
    weight = part.get_parameter(name)
    dealt = distribute_tensor(weight, mesh, [how])
    part.register_parameter(name, nn.Parameter(dealt, requires_grad=weight.requires_grad))
