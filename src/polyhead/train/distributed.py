"""One run on several processes, as `torchrun` starts them: DDP, or FSDP2 with sharded weights.

The batches of a step (`accumulate` of them) are dealt out to the ranks, so that a step sees the
same rows whatever their number, and sums of gradients are those of one process.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.blocks import blocks_of
from polyhead.models.model import TaskModel
from polyhead.train.config import TrainConfig
from polyhead.train.objectives import Loss, Objective

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0

    def share(self, parts: range) -> range:
        """Of a step's batches those of this rank. ConfigError unless all ranks get as many."""
        if len(parts) % self.world:
            some = [str(n) for n in range(1, len(parts) + 1) if len(parts) % n == 0]
            raise ConfigError(
                f"{self.world} processes cannot share the {len(parts)} batches of a step "
                f"(accumulate): start {' or '.join(some)}, or begin a run whose accumulate is a "
                f"multiple of {self.world}, with a lower batch_size"
            )
        return parts[self.rank :: self.world]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        return found.tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` gives: first on the first rank, which fills the caches of the others."""
        if not self.is_first:
            self.wait()
        found = make()
        if self.is_first:
            self.wait()
        return found


def joined(device: str | None) -> tuple[Ranks, str | None]:
    """This process among those of `torchrun`, and the device it is to use."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(), device
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), world), device or "cpu"


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

    Make it before the optimizer, and `connect` it after: with `config.parallel` "fsdp" the model's
    parameters become shards, each block's gathered when it runs, and in bfloat16 stay float32
    masters, cast on the way; DDP wants the parameters as the optimizer leaves them.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: TrainConfig, ranks: Ranks
    ) -> None:
        self.ranks = ranks
        self.step = Step(model, objective)
        self.run: nn.Module = self.step
        self.is_sharded = ranks.world > 1 and config.parallel == "fsdp"
        if self.is_sharded:
            self._shard(model, config)

    def connect(self) -> None:
        """Let gradients of whole models meet."""
        if self.ranks.world > 1 and not self.is_sharded:
            self.run = nn.parallel.DistributedDataParallel(
                self.step, broadcast_buffers=False, find_unused_parameters=True
            )

    def _shard(self, model: nn.Module, config: TrainConfig) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        if not isinstance(model, TaskModel):
            raise ConfigError("fsdp does not know the model of this objective: use ddp")
        if config.optimizer != "adamw":
            raise ConfigError("fsdp keeps parts of matrices, which Muon needs whole: use adamw")
        if config.prune:
            raise ConfigError("fsdp keeps parts of matrices, which pruning needs whole: use ddp")
        dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
        told: dict[str, Any] = {
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            **({"offload_policy": CPUOffloadPolicy()} if config.offload else {}),
        }
        for name in blocks_of(model):
            fully_shard(model.get_submodule(name), **told)
        # What the step itself runs stays whole until its gradient is there.
        fully_shard(self.step, reshard_after_forward=False, **told)

    def __call__(self, model: Any, batch: Any) -> Loss:
        """The objective of the step; `total` is scaled so that means over ranks become sums."""
        if self.ranks.world == 1:
            return self.step.objective(model, batch)
        total = self.run(batch)
        assert self.step.loss is not None
        return replace(self.step.loss, total=total * self.ranks.world)

    def end(self) -> None:
        """Leave the model whole."""
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

    if not isinstance(other, DTensor) or tensor.ndim == 0:
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
