"""One run on several processes: DDP, FSDP2 with sharded weights, and tensor parallelism.

The batches of a step (`accumulate` of them) are dealt out to the ranks, so that a step sees the
same rows whatever their number, and sums of gradients are those of one process.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.formats import PackedWeight
from polyhead.errors import ConfigError
from polyhead.models.blocks import blocks_of
from polyhead.train.config import TrainConfig
from polyhead.train.objectives import Loss, Objective
from polyhead.train.ranks import Ranks


class Step(nn.Module):
    """A model and its objective as one module, whose forward is what a step runs."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.loss: Loss | None = None

    def forward(self, batch: Any) -> Tensor:
        self.loss = self.objective(self.model, batch)
        return self.loss.total


class Parallel:
    """A step whose gradients are shared by all ranks.

    Make it before the optimizer, and `connect` it after: with `config.parallel` "fsdp", and with
    `config.tensor` above 1, the model's parameters become shards, each block's gathered when it
    runs, and in bfloat16 stay float32 masters, cast on the way; DDP wants the parameters as the
    optimizer leaves them.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: TrainConfig, ranks: Ranks,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.ranks = ranks
        self.step = Step(model, objective)
        self.run: nn.Module = self.step
        self.is_sharded = ranks.world > 1 and (config.parallel == "fsdp" or config.tensor > 1)
        if self.is_sharded:
            self._shard(model, config, device)
        else:
            model.to(device)

    def connect(self) -> None:
        """Let gradients of whole models meet."""
        if self.ranks.world > 1 and not self.is_sharded:
            self.run = nn.parallel.DistributedDataParallel(
                self.step, broadcast_buffers=False, find_unused_parameters=True
            )

    def _shard(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        """Each layer dealt out in two directions: inside groups by tensors, between them by FSDP.

        Block by block, so that no device ever holds the whole model.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        from polyhead.train.plans import tensor_parallel

        if config.optimizer == "muon":
            raise ConfigError("fsdp keeps parts of matrices, which Muon needs whole: use adamw")
        if config.prune:
            raise ConfigError("fsdp keeps parts of matrices, which pruning needs whole: use ddp")
        if config.qat != "none":
            raise ConfigError("fsdp keeps parts of matrices, which qat rounds whole: use ddp")
        if any(isinstance(part, PackedWeight) for part in model.modules()):
            raise ConfigError("fsdp cannot share weights that are kept in few bits: use ddp")
        sizes = (self.ranks.groups, self.ranks.tensor)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "tensor"))
        if self.ranks.tensor > 1:
            tensor_parallel(model, mesh["tensor"])
        dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
        told: dict[str, Any] = {
            "mesh": mesh["data"],
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        if config.offload:
            told["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
        for name in blocks_of(model):
            fully_shard(model.get_submodule(name), **told)
        # What the step itself runs stays whole until its gradient is there.
        fully_shard(self.step, reshard_after_forward=False, **told)

    def __call__(self, model: Any, batch: Any) -> Loss:
        """The objective of the step; `total` is scaled so that means over groups become sums."""
        if self.ranks.world == 1:
            return self.step.objective(model, batch)
        total = self.run(batch)
        assert self.step.loss is not None
        return replace(self.step.loss, total=total * self.ranks.groups)

    def end(self) -> None:
        """Leave the model whole; ranks that hold layers together still call it together."""
        for part in self._shards():
            part.unshard()

    def _shards(self) -> list[Any]:
        from torch.distributed.fsdp import FSDPModule

        return [part for part in self.step.modules() if isinstance(part, FSDPModule)]

    @contextmanager
    def whole(self) -> Generator[None]:
        """Every weight whole on every rank, to be run or saved, while this is entered."""
        shards = self._shards() if self.is_sharded else []
        for part in shards:
            part.unshard()
        try:
            yield
        finally:
            for part in shards:
                part.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """A tensor whole, where it is sharded; every rank has to ask."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def local(tensor: Tensor) -> Tensor:
    """A tensor, or this rank's part of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor as `other` is kept: sharded alike, or on its device."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor) or not isinstance(other, DTensor) or tensor.ndim == 0:
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
