"""What a model's layers read while it runs over some inputs, block by block.

Blocks that are done answer from memory, so that the inputs of the next one come of those in few
bits, and all of it costs a few passes in all. N experts, W columns: what a layer reads.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.blocks import blocks_of
from polyhead.models.model import TaskModel
from polyhead.nn.moe import Experts
from polyhead.nn.norm import LayerNorm, RMSNorm

_SOME, _EACH = 8, 64  # calls of which rows are kept, and how many at most
Batch = Tensor | Mapping[str, Tensor]
"""A model's first argument, as token ids `[B, T]`, or several by their names."""


@dataclass
class Inputs:
    """The mean square `[W, W]` of what a layer reads, and the mean size of each column `[W]`.

    Of experts each has its own: `[N, W, W]` and `[N, W]`. some: rows of it, `[n, W]` each; of
    experts none.
    """

    squares: Tensor
    sizes: Tensor
    count: Tensor  # rows so far, [] or [N]
    some: list[Tensor] = field(default_factory=list[Tensor])

    @classmethod
    def none(cls, width: int, device: torch.device, experts: Sequence[int] = ()) -> "Inputs":
        """Nothing read yet; experts: their number, if any."""
        blank = torch.zeros((*experts, width, width), device=device)
        return cls(blank, torch.zeros((*experts, width), device=device), blank.new_zeros(experts))

    def add(self, x: Tensor, expert: int | None = None) -> None:
        """Take in rows `[..., W]`."""
        if not x.numel():
            return
        x = x.detach().flatten(0, -2).float()
        if expert is None and len(self.some) < _SOME:
            self.some.append(x[:: -(-len(x) // _EACH)].clone())
        at: Any = () if expert is None else expert
        before = self.count[at].clone()
        self.count[at] += len(x)
        kept, new = before / self.count[at], 1 / self.count[at]
        self.squares[at] = self.squares[at] * kept + (x.mT @ x) * new
        self.sizes[at] = self.sizes[at] * kept + x.abs().sum(0) * new


@dataclass(eq=False)
class Group:
    """Layers of a unit that read the same; `part` of experts: "gate" (and up) or "down".

    norm: what wrote their input, where that came from a norm as it is.
    """

    layers: list[nn.Module]
    part: str = ""
    norm: nn.Module | None = None

    @property
    def width(self) -> int:
        """Columns that are read."""
        layer: Any = self.layers[0]
        return (getattr(layer, self.part) if self.part else layer.weight).shape[-1]


@dataclass(eq=False)
class Unit:
    """A block, or a layer that stands alone; `calls` in a forward."""

    name: str
    module: nn.Module
    calls: int = 0
    groups: list[Group] = field(default_factory=list[Group])


class _EnoughError(Exception):
    """The rest of a forward is of no use."""


class Walk:
    """A model's way through `batches`. `units`: what holds `targets` and runs, in its order.

    Errors: ConfigError where there are no batches, and for one that the model does not take.
    """

    def __init__(
        self, model: TaskModel, batches: Sequence[Batch], targets: Sequence[nn.Module]
    ) -> None:
        if not batches:
            raise ConfigError("calibration has no batches; give some inputs of the model's own")
        self.model, self.batches = model, batches
        self._outputs: dict[nn.Module, list[list[Any]]] = {}
        self._layer_calls = Counter[nn.Module]()
        self.units = self._look(set(targets))

    def gather(self, unit: Unit, groups: Sequence[Group]) -> list[Inputs]:
        """What groups of a unit read, all units before it as they are now."""
        device = self.model.device
        found: list[Inputs] = []
        for group in groups:
            layer: Any = group.layers[0]
            found.append(Inputs.none(group.width, device, [len(layer.gate)] if group.part else []))
        for number in range(len(self.batches)):
            with ExitStack() as stack:
                for group, inputs in zip(groups, found, strict=True):
                    calls = self._layer_calls[group.layers[0]] if group is groups[-1] else None
                    stack.enter_context(_watched(group, inputs, calls))
                self._forward(number)
        if not all(inputs.squares.isfinite().all() for inputs in found):
            raise ConfigError(f"calibration makes {unit.name} read what is no finite number")
        return found

    def finish(self, unit: Unit) -> None:
        """Let a unit answer from memory from here on, with what it answers now."""
        found = [self.answers(unit, number) for number in range(len(self.batches))]
        self._outputs[unit.module] = found

    def answers(self, unit: Unit, number: int = 0) -> list[Any]:
        """What a unit answers in the forward of a batch, call by call."""
        found: list[Any] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            if len(found) == unit.calls:
                raise _EnoughError

        hook = unit.module.register_forward_hook(note)
        try:
            self._forward(number)
        finally:
            hook.remove()
        return found

    def _forward(self, number: int) -> None:
        """Run the model over a batch, as far as someone wants."""
        known = {module: answers[number] for module, answers in self._outputs.items()}
        with torch.no_grad(), _replaying(known), suppress(_EnoughError):
            answered(self.model, self.batches[number])

    def _look(self, targets: set[nn.Module]) -> list[Unit]:
        """One forward, to see what runs and reads in which order."""
        units = {unit.module: unit for unit in _units(self.model, targets)}
        home = {part: unit for unit in units.values() for part in unit.module.modules()}
        order: dict[nn.Module, Unit] = {}
        last: list[Any] = [None, None, None, None]  # unit, its input, a norm, its output

        def starts(module: nn.Module, args: Any) -> None:
            units[module].calls += 1
            order.setdefault(module, units[module])

        def reads(layer: nn.Module, args: Any) -> None:
            unit, x = home[layer], args[0]
            self._layer_calls[layer] += 1
            if self._layer_calls[layer] > 1:
                return
            if isinstance(layer, Experts):
                unit.groups += [Group([layer], "gate"), Group([layer], "down")]
            elif unit is last[0] and x is last[1]:
                unit.groups[-1].layers.append(layer)
            else:
                is_normed = home.get(last[2]) is unit and _same_memory(x, last[3])
                unit.groups.append(Group([layer], norm=last[2] if is_normed else None))
            last[:2] = unit, x

        def normed(module: nn.Module, args: Any, output: Tensor) -> None:
            last[2:] = module, output

        hooks = [module.register_forward_pre_hook(starts) for module in units]
        for part in home:
            if part in targets:
                hooks.append(part.register_forward_pre_hook(reads))
            elif isinstance(part, LayerNorm | RMSNorm):
                hooks.append(part.register_forward_hook(normed))
        try:
            with torch.no_grad():
                answered(self.model, self.batches[0])
        finally:
            for hook in hooks:
                hook.remove()
        return list(order.values())


def _units(model: TaskModel, targets: set[nn.Module]) -> Iterator[Unit]:
    """The blocks that hold targets, and the targets outside of them."""
    met = set[nn.Module]()
    for name in blocks_of(model):
        block = model.get_submodule(name)
        inside = targets.intersection(block.modules()) - met
        if inside:
            met |= inside
            yield Unit(name, block)
    for name, part in model.named_modules():
        if part in targets and part not in met:
            yield Unit(name, part)


def answered(model: TaskModel, batch: Batch) -> Tensor:
    """The states that a model answers to a batch with; ConfigError where it does not take that."""
    try:
        if isinstance(batch, Tensor):
            return model.hidden(batch.to(model.device))
        return model.hidden(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    except TypeError as error:
        raise ConfigError(
            f"calibration does not fit a {model.config.model_type}: {error}; give each batch as a "
            "mapping of the model's arguments"
        ) from None


def _same_memory(x: Any, y: Tensor) -> bool:
    return isinstance(x, Tensor) and x.data_ptr() == y.data_ptr() and x.numel() == y.numel()


@contextmanager
def _watched(group: Group, inputs: Inputs, calls: int | None) -> Iterator[None]:
    """Take in what a group reads; end the forward after so many calls."""
    seen = 0

    def note(layer: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += 1
        if isinstance(layer, Experts):
            for expert, x in enumerate(args[0].split(args[1].tolist())):
                inputs.add(_gated(layer, x, expert) if group.part == "down" else x, expert)
        else:
            inputs.add(args[0])
        if seen == calls:
            raise _EnoughError

    hook = group.layers[0].register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()


def _gated(experts: Experts, x: Tensor, expert: int) -> Tensor:
    """What one expert's last product reads."""
    gate, up = F.linear(x, experts.gate[expert]), F.linear(x, experts.up[expert])
    return experts.activation(gate) * up


@contextmanager
def _replaying(outputs: Mapping[nn.Module, Sequence[Any]]) -> Iterator[None]:
    """Let modules answer with what is known, call by call."""
    for module, known in outputs.items():
        left = iter(known)
        vars(module)["forward"] = lambda *args, left=left, **named: next(left)
    try:
        yield
    finally:
        for module in outputs:
            del vars(module)["forward"]
