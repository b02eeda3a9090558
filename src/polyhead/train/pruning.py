"""Pruning while a model learns: more and more of its weights become zero, and stay so."""

from collections.abc import Collection

from torch import Tensor

from polyhead.compress.parts import PARTS, least_parts
from polyhead.compress.prune import Sparsity, check, counted, prunable, smallest
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.train.config import TrainConfig
from polyhead.train.optim import Masters


def sparsity_at(step: int, config: TrainConfig) -> float:
    """The share of weights that are zero during step 0 … config.steps - 1.

    Rises from 0 at `prune_begin` to `prune` at `prune_end`, steeply at first, in jumps of
    `prune_every` steps (Zhu and Gupta 2017, equation 1).
    """
    last = min(round(config.prune_end * config.steps), config.steps - 1)
    first = min(round(config.prune_begin * config.steps), last)
    if step < first or not config.prune:
        return 0.0
    if step >= last:
        return config.prune
    done = (step - first) // config.prune_every * config.prune_every / (last - first)
    return config.prune * (1 - (1 - done) ** 3)


class Pruner:
    """Prunes the masters of a run as its settings ask; without `config.prune` it does nothing."""

    def __init__(self, model: TaskModel, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.names = frozenset(_weights(model, config) if config.prune else ())

    def before(self, step: int, optimizer: Masters) -> None:
        """Choose anew what is zero, where more is to be from this step on."""
        wanted = sparsity_at(step, self.config)
        if wanted > sparsity_at(step - 1, self.config):
            optimizer.hold(self._going(wanted, optimizer))

    def _going(self, wanted: float, optimizer: Masters) -> dict[str, Tensor]:
        by, share = self.config.prune_by, self.config.prune
        if by in PARTS:
            return least_parts(self.model, share, by, wanted / share)
        return smallest(self._weights(optimizer), wanted, by)

    def is_done(self, steps: int) -> bool:
        """Whether all that is to be zero has been so in the last of these steps."""
        return sparsity_at(steps - 1, self.config) == self.config.prune

    def found(self, optimizer: Masters) -> Sparsity | None:
        """What is zero, counted; None in a run that does not prune."""
        return counted(self._weights(optimizer)) if self.names else None

    def _weights(self, optimizer: Masters) -> dict[str, Tensor]:
        named = zip(optimizer.names, optimizer.masters, strict=True)
        return {name: master.detach() for name, master in named if name in self.names}


def _weights(model: TaskModel, config: TrainConfig) -> Collection[str]:
    """Names of the matrices in which weights go. Errors: ConfigError as of `prune`."""
    if config.prune_by in PARTS:
        return least_parts(model, config.prune, config.prune_by)
    return prunable(model, config.prune_targets)


def check_pruning(model: TaskModel, config: TrainConfig) -> None:
    """ConfigError for a model that cannot be pruned as the settings ask."""
    if not config.prune:
        return
    check(config.prune, config.prune_by, config.prune_targets)
    weights, learns = _weights(model, config), dict(model.named_parameters())
    if still := [name for name in weights if not learns[name].requires_grad]:
        raise ConfigError(
            f"{still[0]} does not learn, and prune would change it: name prune_targets"
        )
    if config.prune_by == "2:4":
        smallest(prunable(model, config.prune_targets), 0.0, "2:4")
