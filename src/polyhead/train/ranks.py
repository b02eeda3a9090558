"""The processes of a run: which one this is, what they do together, and how it joins them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from polyhead.errors import ConfigError, FileError, PolyheadError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and of how many. `tensor` neighbours hold the layers of one model
    together and see the same batches; there are `world / tensor` such groups."""

    rank: int = 0
    world: int = 1
    tensor: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks and writes."""
        return self.rank == 0

    @property
    def group(self) -> int:
        """Which of the groups that see batches of their own this rank is in."""
        return self.rank // self.tensor

    @property
    def groups(self) -> int:
        """How many see batches of their own."""
        return self.world // self.tensor

    def share(self, parts: range) -> range:
        """Of a step's batches those of this rank. ConfigError unless all groups get as many."""
        if len(parts) % self.groups:
            who = "processes" if self.tensor == 1 else f"groups of {self.tensor} processes"
            some = [str(n * self.tensor) for n in range(1, len(parts) + 1) if len(parts) % n == 0]
            raise ConfigError(
                f"{self.groups} {who} cannot share the {len(parts)} batches of a step "
                f"(accumulate): start {' or '.join(some)}, or begin a run whose accumulate is a "
                f"multiple of {self.groups}, with a lower batch_size"
            )
        return parts[self.group :: self.groups]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all groups."""
        if self.world == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        # What the ranks of a group say alike counts once.
        return (found / self.tensor).tolist()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank, in their order; where it fails on one, all raise.

        So none waits for what will not come. Errors: on the rank that failed its own (of the system
        a FileError), on the others a PolyheadError that says which rank that was.
        """
        if self.world == 1:
            return [work()]
        answer, error = None, None
        try:
            answer = work()
        except OSError as cause:
            error = FileError(f"rank {self.rank}: {line(cause)}; check space and permissions")
        except Exception as cause:
            error = cause
        told: list[tuple[T, str | None]] = [None] * self.world  # pyright: ignore[reportAssignmentType]
        dist.all_gather_object(told, (answer, None if error is None else line(error)))
        if error is not None:
            raise error from None
        for rank, (_, fault) in enumerate(told):
            if fault is not None:
                raise PolyheadError(fault if fault.startswith("rank") else f"rank {rank}: {fault}")
        return [answer for answer, _ in told]

    def first(self, work: Callable[[], T]) -> T | None:
        """What `work` gives, on the first rank alone; the others wait, and raise if it does."""
        found: list[T] = []
        self.together(lambda: found.append(work()) if self.is_first else None)
        return found[0] if found else None

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` gives: first on the first rank, which fills the caches of the others."""
        found: list[T] = []
        for turn in (True, False) if self.world > 1 else (True,):
            self.together(lambda turn=turn: found.append(make()) if self.is_first is turn else None)
        return found[0]


def joined(device: str | None, tensor: int = 1) -> tuple[Ranks, str | None]:
    """This process among those of `torchrun`, or of a process group that is there already, and the
    device it is to use.

    Errors: ConfigError where the processes do not make groups of `tensor`.
    """
    is_there = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if is_there else int(os.environ.get("WORLD_SIZE", "1"))
    if world % tensor:
        there = "is 1 process" if world == 1 else f"are {world} processes"
        raise ConfigError(
            f"tensor is {tensor}, and there {there}: start a multiple of {tensor}, as torchrun "
            f"--nproc-per-node {tensor} does"
        )
    if world == 1:
        return Ranks(), device
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_gpu and not (is_there and device is not None and ":" in device):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if on_gpu:
        torch.cuda.set_device(device)
    if not is_there:
        # What stands on the CPU (offloaded parts, checkpoints, counts) travels by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return Ranks(dist.get_rank(), world, tensor), device or "cpu"


def line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
