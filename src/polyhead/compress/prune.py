"""Weights that are zero: those of least magnitude go.

N matrices of a stack (experts), R rows, W columns: what a row reads.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyhead.compress.layers import check_floats
from polyhead.compress.parts import PARTS, least_parts
from polyhead.errors import ConfigError
from polyhead.models.blocks import in_blocks
from polyhead.models.model import TaskModel
from polyhead.nn.moe import Experts, Router


def prune(
    model: TaskModel, sparsity: float = 0.5, *, by: str = "layer", targets: Sequence[str] = ()
) -> TaskModel:
    """A copy of `model` with the share `sparsity` of its matrices' weights set to zero.

    by:      "layer": each matrix, each expert too, loses that share; "global": one threshold for
             all of them; "2:4": of every four weights side by side two stay (Mishra et al. 2021),
             which is a sparsity of 0.5; "heads", "neurons": of each attention or feed-forward that
             share of its parts writes nothing any more, so that `shrink` takes just those away.
    targets: parts of names, as "ffn" or "attention.out": the matrices to prune. Unless given, the
             linear layers and experts of the blocks; no embeddings, heads, norms and routers.
    The copy has the old one's shapes and saves as a plain checkpoint. The old model is untouched.
    Errors: ConfigError for a share that cannot be, a name that no matrix has, and a model that has
    adapters or is in few bits.
    """
    check(sparsity, by, targets)
    found = copy.deepcopy(model)
    if by in PARTS:
        weights, going = dict(found.named_parameters()), least_parts(found, sparsity, by)
    else:
        weights = prunable(found, targets)
        going = smallest(weights, sparsity, by)
    with torch.no_grad():
        for name, goes in going.items():
            weights[name].masked_fill_(goes, 0.0)
    return found


@dataclass(frozen=True)
class Sparsity:
    """How many of some weights are zero; `matrices`: the share in each, by its name."""

    zeros: int
    weights: int
    matrices: Mapping[str, float]

    @property
    def share(self) -> float:
        """Of all of them."""
        return self.zeros / self.weights


def sparsity(model: TaskModel, targets: Sequence[str] = ()) -> Sparsity:
    """How many weights are zero of the matrices that `prune` takes, or of `targets`."""
    return counted(prunable(model, targets))


def counted(weights: Mapping[str, Tensor]) -> Sparsity:
    """How many of these weights are zero."""
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    shares = {name: zeros[name] / weight.numel() for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return Sparsity(sum(zeros.values()), total, shares)


def prunable(model: nn.Module, targets: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The matrices that `prune` takes, by name. Errors: ConfigError as there."""
    check_floats(model)
    parts = dict(model.named_modules())
    named = {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2}
    for target in targets:
        if not any(target in name for name in named):
            raise ConfigError(f"targets names {target!r}, and no matrix of the model does")
    if targets:
        return {n: w for n, w in named.items() if any(target in n for target in targets)}
    inside = in_blocks(model)
    found = {n: w for n, w in named.items() if n in inside and _multiplies(parts, n)}
    if not found:
        raise ConfigError("the model has no matrices in blocks: name some as targets")
    return found


def _multiplies(parts: Mapping[str, nn.Module], name: str) -> bool:
    part = parts[name.rpartition(".")[0]]
    return isinstance(part, nn.Linear | Experts) and not isinstance(part, Router)


def check(sparsity: float, by: str, targets: Sequence[str] = ()) -> None:
    """ConfigError for a sparsity and a way of choosing that cannot be."""
    if by not in (*WAYS, *PARTS):
        raise ConfigError(f"pruning is by {by!r}: choose one of {', '.join((*WAYS, *PARTS))}")
    if by in PARTS and targets:
        raise ConfigError(f"by {by} all layers lose as many: leave out targets, {targets[0]!r}")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is {sparsity}: a share from 0 to below 1")
    if by == "2:4" and sparsity not in (0.0, 0.5):
        raise ConfigError(f"sparsity is {sparsity}: by 2:4 it is 0.5, two of every four")


def smallest(weights: Mapping[str, Tensor], sparsity: float, by: str) -> dict[str, Tensor]:
    """Which weights go, by name: True at the share `sparsity` of least magnitude.

    A weight that is zero goes first, so that with a growing share nothing comes back. By "2:4" the
    share may be less than a half: then only those go that the pattern would take.
    """
    return WAYS[by](weights, sparsity)


def _by_layer(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    return {
        name: _least(_alone(weight.abs()), sparsity).view_as(weight)
        for name, weight in weights.items()
    }


def _alone(weight: Tensor) -> Tensor:
    """A matrix as one row `[1, R W]`, those of a stack as several `[N, R W]`."""
    return weight.flatten(1) if weight.ndim == 3 else weight.reshape(1, -1)


def _by_all(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    sizes = [weight.numel() for weight in weights.values()]
    goes = _least(torch.cat([weight.abs().flatten() for weight in weights.values()]), sparsity)
    parts = zip(weights.items(), goes.split(sizes), strict=True)
    return {name: part.view_as(weight) for (name, weight), part in parts}


def _by_fours(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    return _by_layer({n: _in_fours(n, weight) for n, weight in weights.items()}, sparsity)


WAYS: dict[str, Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]] = {
    "layer": _by_layer,
    "global": _by_all,
    "2:4": _by_fours,
}


def _in_fours(name: str, weight: Tensor) -> Tensor:
    """Magnitudes; infinite of the two of every four that stay."""
    if weight.shape[-1] % 4:
        raise ConfigError(f"{name} has {weight.shape[-1]} columns, which 2:4 cannot divide by four")
    fours = weight.abs().unflatten(-1, (-1, 4))
    stays = fours.topk(2).indices
    return fours.scatter(-1, stays, torch.inf).flatten(-2)


def _least(scores: Tensor, share: float) -> Tensor:
    """True at the least of the scores `[..., n]`, a share of each row, ties as they fall."""
    count = round(share * scores.shape[-1])
    least = scores.topk(count, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)
