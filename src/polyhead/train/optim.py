"""What moves the weights: masters in float32, optimizers by name, and rates by the step."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from polyhead.compress.formats import PackedWeight
from polyhead.errors import ConfigError, PolyheadError
from polyhead.models.blocks import in_blocks
from polyhead.train.config import TrainConfig
from polyhead.train.depth import depths, num_blocks
from polyhead.train.distributed import gathered, local, shard_like
from polyhead.train.lion import Lion
from polyhead.train.muon import Muon
from polyhead.train.schedule_free import ScheduleFree

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum", "z", "weights", "largest_lr")


class NotFiniteError(PolyheadError):
    """A loss or a gradient is no number; no weight was changed by it."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 … config.steps - 1: linear warm-up, then the schedule's course."""
    steps, low = config.steps, config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = config.warmup if config.warmup < steps else steps // 10
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant" or config.optimizer == "schedule-free":
        return config.lr
    start = warmup if config.schedule != "wsd" else max(warmup, steps - int(config.decay * steps))
    # 0 at the first step after `start`, 1 at the last of the run.
    done = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    if config.schedule == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return config.lr + (low - config.lr) * done


class Masters:
    """Weights and moments in float32, whatever the model's weights are, and what moves them.

    In float32 the masters are the parameters themselves. Otherwise the model's parameters become
    `dtype`, and each step writes the rounded masters to them. Matrices (and embeddings) decay;
    norms and biases do not, unless `config.decays` says so. Gradients of several backward passes
    are summed in float32. With `config.ema` a moving average of the masters is kept besides,
    with schedule-free the average that it learns.
    `pruned`, by name: True where a weight is held at zero.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.clip = config.clip
        dtype = getattr(torch, config.dtype)
        # Shards are float32 masters themselves, cast where they are gathered.
        is_sharded = any(isinstance(p, DTensor) for p in self.params)
        self.separate = dtype != torch.float32 and not is_sharded
        self.masters: list[Tensor] = list(self.params)
        if self.separate:
            self.masters = [p.detach().float() for p in self.params]
        if not is_sharded:
            cast(model, dtype)
        self.ema = config.ema
        has_averages = config.ema > 0 or config.optimizer == "schedule-free"
        self.averages = [m.detach().clone() for m in self.masters] if has_averages else []
        self.movers = self._movers(model, config)
        self.pruned: dict[str, Tensor] = {}

    def _movers(self, model: nn.Module, config: TrainConfig) -> list[Optimizer]:
        """The optimizer that is asked for, and Muon for the matrices of blocks."""
        matrices = in_blocks(model) if config.optimizer == "muon" else set[str]()
        groups: dict[tuple[bool, float, float, Any], list[Tensor]] = {}
        for (name, factor, decay), master in zip(
            settings_of(model, self.names, config), self.masters, strict=True
        ):
            groups.setdefault((name in matrices, factor, decay, _mesh(master)), []).append(master)
        rows = [
            (by_muon, {"params": some, "weight_decay": decay, "factor": factor})
            for (by_muon, factor, decay, _), some in groups.items()
        ]
        movers: list[Optimizer] = []
        if others := [row for by_muon, row in rows if not by_muon]:
            movers.append(self._mover(others, config))
        if some := [row for by_muon, row in rows if by_muon]:
            movers.append(Muon(some, lr=config.lr))
        return movers

    def _mover(self, groups: list[dict[str, Any]], config: TrainConfig) -> Optimizer:
        """What moves all that Muon does not."""
        lr, betas, eps = config.lr, config.betas, config.eps
        if config.optimizer == "lion":
            return Lion(groups, lr, betas)
        if config.optimizer == "schedule-free":
            averages = dict(zip(self.masters, self.averages, strict=True))
            return ScheduleFree(groups, averages, lr, betas, eps)
        return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def collect(self) -> None:
        """Add the gradients of a backward pass to the masters' and free them (no-op in float32)."""
        if not self.separate:
            return
        for master, param in zip(self.masters, self.params, strict=True):
            if param.grad is None:
                continue
            if master.grad is None:
                master.grad = param.grad.float()
            else:
                master.grad += param.grad
            param.grad = None

    def discard(self) -> None:
        """Free every gradient, unused."""
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    @torch.no_grad()
    def step(self, lr: float, limit: Callable[[float], float] | None = None) -> float:
        """Clip, update, and clear the gradients; the norm before clipping.

        limit: the largest norm allowed, of the norm found; `config.clip` holds besides. A norm that
        is not finite raises NotFiniteError and leaves every weight as it is.
        """
        for master, goes in self._held():
            if master.grad is not None:
                master.grad.masked_fill_(goes, 0.0)
        alike: dict[Any, list[Tensor]] = {}
        for master in self.masters:
            if master.grad is not None:
                alike.setdefault(_mesh(master), []).append(master)
        norms = [
            gathered(get_total_norm([m.grad for m in some if m.grad is not None]))
            for some in alike.values()
        ]
        norm = get_total_norm(norms) if len(norms) > 1 else norms[0]
        value = float(norm)
        if not math.isfinite(value):
            self.discard()
            raise NotFiniteError(f"the gradient's norm is {value}: lower lr, or check the data")
        largest = min(self.clip or math.inf, math.inf if limit is None else limit(value))
        if largest < math.inf:
            for some in alike.values():
                clip_grads_with_norm_(some, largest, norm)
        for mover in self.movers:
            for group in mover.param_groups:
                group["lr"] = lr * group["factor"]
            mover.step()
            mover.zero_grad(set_to_none=True)
        for master, goes in self._held():
            master.masked_fill_(goes, 0.0)
        if self.ema:
            for average, master in zip(self.averages, self.masters, strict=True):
                average.lerp_(master, 1 - self.ema)
        self._round()
        return value

    @torch.no_grad()
    def hold(self, pruned: Mapping[str, Tensor]) -> None:
        """Set weights to zero, by name where `pruned` is True, with their moments and averages;
        there they stay, whatever gradients say."""
        self.pruned = dict(pruned)
        for master, goes in self._held():
            beside = [mover.state.get(master, {}).values() for mover in self.movers]
            for tensor in (master, *(moment for moments in beside for moment in moments)):
                if tensor.shape == goes.shape:
                    tensor.masked_fill_(goes, 0.0)
        for name, average in zip(self.names, self.averages, strict=bool(self.averages)):
            if name in self.pruned:
                average.masked_fill_(self.pruned[name], 0.0)
        self._round()

    def _held(self) -> list[tuple[Tensor, Tensor]]:
        """Masters with what of them is held at zero."""
        named = zip(self.names, self.masters, strict=True) if self.pruned else ()
        return [(master, self.pruned[name]) for name, master in named if name in self.pruned]

    def moments_are_finite(self) -> bool:
        """Whether moments and averages, of this rank's part, are numbers: a look at each step."""
        states = [state for mover in self.movers for state in mover.state.values()]
        moments = [value for state in states for value in state.values() if value.ndim]
        moments = [local(value) for value in (*moments, *self.averages)]
        # One quick pass; where squares alone overflowed, the exact one decides.
        quick = not moments or math.isfinite(float(get_total_norm(moments)))
        return quick or all(bool(moment.isfinite().all()) for moment in moments)

    def not_finite(self) -> str | None:
        """A weight, a moment or an average, of this rank's part, that is no longer finite: no step
        mends that, and it is not to be saved."""
        weights = zip(self.names, self.params, strict=True)
        for name, tensor in (*weights, *self._kept()):
            if not bool(local(tensor.detach()).isfinite().all()):
                return name
        return None

    def _round(self) -> None:
        """Write the masters to the model's own weights."""
        if self.separate:
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The model with the averages for its weights, while this is entered; where there are
        none it stays as it is."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages in the place of the masters, and those in theirs."""
        for master, average in zip(self.masters, self.averages, strict=bool(self.averages)):
            before = master.clone()
            master.copy_(average)
            average.copy_(before)
        if self.averages:
            self._round()

    def state(self) -> dict[str, Tensor]:
        """Masters, moments, step counts, averages and what is pruned, by parameter name; of what is
        sharded this rank's parts."""
        return {
            **dict(self._kept()),
            **{f"pruned.{name}": goes for name, goes in self.pruned.items()},
        }

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        """What `state` gives, but for what is pruned."""
        for name, master in zip(self.names, self.masters, strict=True):
            yield f"master.{name}", master.detach()
            for mover in self.movers:
                for key, value in mover.state.get(master, {}).items():
                    yield f"{key}.{name}", value
        for name, average in zip(self.names, self.averages, strict=bool(self.averages)):
            yield f"average.{name}", average

    def blank(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Room for what `state` would give of a run that has the tensors of `shapes`."""
        found: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            for key in ("master", "average", *MOMENTS):
                # Counts of steps are numbers; all else has its weight's shape.
                if (shape := shapes.get(f"{key}.{name}")) is not None:
                    like = master.detach()
                    found[f"{key}.{name}"] = (
                        torch.empty_like(like) if shape else local(like).new_empty(())
                    )
            if f"pruned.{name}" in shapes:
                found[f"pruned.{name}"] = torch.empty_like(master, dtype=torch.bool)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave; the model's weights follow the masters."""
        owners = {
            id(param): mover
            for mover in self.movers
            for group in mover.param_groups
            for param in group["params"]
        }
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(shard_like(state[f"master.{name}"], master))
                # AdamW keeps its step count on the CPU or beside the weights, as it made it.
                owners[id(master)].state[master] = {
                    key: shard_like(state[f"{key}.{name}"], master).clone()
                    for key in MOMENTS
                    if f"{key}.{name}" in state
                }
            for name, average in zip(self.names, self.averages, strict=bool(self.averages)):
                average.copy_(shard_like(state[f"average.{name}"], average))
            self.pruned = {
                name: state[f"pruned.{name}"].clone().to(master.device)
                for name, master in zip(self.names, self.masters, strict=True)
                if f"pruned.{name}" in state
            }
            self._round()


def _mesh(tensor: Tensor) -> Any:
    """The ranks that a tensor is dealt out to: torch's operators on lists take one kind at once."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights, packed ones too, as another type, in place; what is computed once stays as it is."""
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(dtype)
    for part in model.modules():
        if isinstance(part, PackedWeight):
            part.dtype = dtype


def settings_of(
    model: nn.Module, names: Sequence[str], config: TrainConfig
) -> Iterator[tuple[str, float, float]]:
    """Each parameter's name, what its learning rate is multiplied by, and its weight decay.

    `config.layer_decay` for each block that lies above it (Howard and Ruder 2018), times the
    factors of `config.rates`; `config.decays` in the place of `config.weight_decay`. Errors:
    ConfigError for a pattern that names no parameter.
    """
    rates, decays = _patterns("rates", config.rates), _patterns("decays", config.decays)
    for field, patterns in (("rates", rates), ("decays", decays)):
        for pattern in patterns:
            if not any(pattern in name for name in names):
                raise ConfigError(f"{field} names {pattern!r}, and no parameter that learns does")
    depth = depths(model) if config.layer_decay != 1.0 else {}
    levels = num_blocks(model) + 1
    sizes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    for name in names:
        factor = config.layer_decay ** round((1 - depth.get(name, 1.0)) * levels)
        for pattern, value in rates.items():
            factor *= value if pattern in name else 1.0
        decay = config.weight_decay if sizes[name] >= 2 else 0.0
        for pattern, value in decays.items():
            decay = value if pattern in name else decay
        yield name, factor, decay


def _patterns(field: str, words: Sequence[str]) -> dict[str, float]:
    """`pattern=number` words."""
    found: dict[str, float] = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            found[pattern] = float(number)
        except ValueError:
            found[pattern] = math.nan
        if not pattern or not 0 <= found[pattern] < math.inf:
            raise ConfigError(f"{field} has {word!r}: write a part of names=number, as in head=10")
    return found
