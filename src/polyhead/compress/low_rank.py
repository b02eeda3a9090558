"""Linear layers as the product of two narrow ones, by truncated singular value decomposition.

A matrix W `[R, C]` of rank r takes r (R + C) weights and products in place of R C.
"""

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.importance import Batch, each_batch
from polyhead.compress.layers import check_floats
from polyhead.compress.prune import prunable
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.low_rank import LowRankLinear

DAMPING = 1e-4  # of the mean second moment: inputs that were never seen have a weight too


def low_rank(
    model: TaskModel,
    *,
    rank: int | None = None,
    keep: float | None = None,
    energy: float | None = None,
    moments: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = (),
) -> TaskModel:
    """A copy of `model` whose blocks' linear layers are two narrow ones, where that is less.

    Of these one says how narrow:
    rank:    the same for all.
    keep:    share of each layer's weights that there are afterwards.
    energy:  share of each layer's squared singular values that stay.
    moments: of what each layer reads, from `second_moments`: the answers to texts are kept as they
             are, in place of the weights (SVD-LLM, Wang et al. 2024, section 3.1).
    targets: parts of names, as "ffn"; unless given, all linear layers of the blocks, no experts.
    The copy says its ranks in config.json as `polyhead_ranks` and loads again by `load`; others do
    not read it: `merge_low_rank` makes a plain model of it. The old model is untouched.
    Errors: ConfigError for sizes that cannot be, a name that no layer has, and a model that has
    adapters, is in few bits or of low rank already.
    """
    _check(model, rank, keep, energy)
    layers = _layers(model, targets)
    memo: dict[int, Any] = {}
    ranks: dict[str, int] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            root = _root(moments, name, layer)
            left, values, right = _decomposed(layer.weight, root)
            rows, columns = layer.weight.shape
            own = rank or _rank(values, rows, columns, keep, energy)
            if own * (rows + columns) >= rows * columns:
                continue
            ranks[name] = own
            right = right[:own] if root is None else _undone(right[:own], root)
            memo[id(layer)] = _narrow(layer, left[:, :own], values[:own], right)
    if not ranks:
        raise ConfigError("no layer would be smaller in two: ask for a lower rank, keep or energy")
    found = copy.deepcopy(model, memo)
    found.config, found.origin = replace(model.config, ranks=ranks), None
    found.tie()
    return found


def merge_low_rank(model: TaskModel) -> TaskModel:
    """A copy of `model` with one matrix in the place of each two: a plain checkpoint again."""
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, LowRankLinear):
                memo[id(part)] = _whole(part)
    if not memo:
        raise ConfigError("the model has no layers of low rank to merge")
    found = copy.deepcopy(model, memo)
    read = {key: value for key, value in model.config.source.items() if key != "polyhead_ranks"}
    found.config = replace(model.config, ranks=None, source=read)
    found.tie()
    return found


def second_moments(
    model: TaskModel, batches: Tensor | Iterable[Batch], targets: Sequence[str] = ()
) -> dict[str, Tensor]:
    """What the layers that `low_rank` takes read, on texts: the mean of x xᵀ, `[C, C]` by name.

    batches: token ids `[rows, T]`, each row by itself, or an iterable of ids `[B, T]` or of what
    the model is called with by name. Errors: ConfigError where there is no batch.
    """
    check_floats(model, "looked into")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _reading(_layers(model, targets), sums, counts):
            for batch in each_batch(batches):
                model(**({"input_ids": batch} if isinstance(batch, Tensor) else batch))
    finally:
        model.train(was_training)
    if not sums:
        raise ConfigError("moments are asked of no batch at all: give them some texts")
    return {name: total / counts[name] for name, total in sums.items()}


@contextmanager
def _reading(
    layers: Mapping[str, nn.Linear], sums: dict[str, Tensor], counts: dict[str, int]
) -> Generator[None]:
    def note(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        sums[name] = sums.get(name, 0.0) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(model: TaskModel, rank: int | None, keep: float | None, energy: float | None) -> None:
    check_floats(model, "factored")
    if model.config.ranks:
        raise ConfigError("the model is of low rank already: start from merge_low_rank(model)")
    if sum(size is not None for size in (rank, keep, energy)) != 1:
        raise ConfigError("how narrow layers are to be is said by one of rank, keep and energy")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is {rank}: it must be 1 or more")
    for name, share in (("keep", keep), ("energy", energy)):
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"{name} is {share}: a share between 0 and 1")


def _layers(model: TaskModel, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that are factored, by their names in the backbone."""
    found: dict[str, nn.Linear] = {}
    for name in prunable(model, targets):
        layer = model.get_submodule(name.rpartition(".")[0])
        if name.startswith("backbone.") and type(layer) is nn.Linear:
            found[name.removeprefix("backbone.").removesuffix(".weight")] = layer
    if not found:
        raise ConfigError("the model has no linear layers to factor there: name other targets")
    return found


def _root(moments: Mapping[str, Tensor] | None, name: str, layer: nn.Linear) -> Tensor | None:
    """The Cholesky factor of what a layer reads, L with L Lᵀ = E[x xᵀ]."""
    if moments is None:
        return None
    if name not in moments or len(moments[name]) != layer.in_features:
        raise ConfigError(f"moments do not speak of {name}: were they asked of this model?")
    square = moments[name].double()
    mean = square.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
    return torch.linalg.cholesky(square + DAMPING * mean * eye)


def _decomposed(weight: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.float() if root is None else weight.double() @ root
    return torch.linalg.svd(wide, full_matrices=False)


def _undone(right: Tensor, root: Tensor) -> Tensor:
    """right L⁻¹."""
    return torch.linalg.solve_triangular(root, right, upper=False, left=False)


def _rank(values: Tensor, rows: int, columns: int, keep: float | None, energy: float | None) -> int:
    if keep is not None:
        return max(1, int(keep * rows * columns / (rows + columns)))
    assert energy is not None
    shares = values.double().square().cumsum(0)
    return int((shares < energy * shares[-1]).sum()) + 1


def _narrow(layer: nn.Linear, left: Tensor, values: Tensor, right: Tensor) -> LowRankLinear:
    rows, columns = layer.weight.shape
    with torch.device("meta"):
        found = LowRankLinear(columns, rows, len(values), layer.bias is not None)
    # Either half is as large as the other, so that both learn alike.
    half = values.sqrt()
    state = {
        "first.weight": (half[:, None] * right).to(layer.weight.dtype),
        "second.weight": (left * half).to(layer.weight.dtype),
    }
    if layer.bias is not None:
        state["second.bias"] = layer.bias.detach().clone()
    found.load_state_dict({name: part.contiguous() for name, part in state.items()}, assign=True)
    return found.train(layer.training)


def _whole(part: LowRankLinear) -> nn.Linear:
    with torch.device("meta"):
        found = nn.Linear(part.first.in_features, part.out_features, part.bias is not None)
    state = {"weight": (part.second.weight.float() @ part.first.weight.float())}
    state["weight"] = state["weight"].to(part.second.weight.dtype)
    if part.bias is not None:
        state["bias"] = part.bias.detach().clone()
    found.load_state_dict(state, assign=True)
    return found.train(part.training)
