"""Weights followed through all layers: what of the first tokens reaches the last ones.

B rows, T tokens or patches, H heads.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain.answers import stack_of
from polyhead.explain.attribution import learned_embeddings
from polyhead.explain.capture import capture
from polyhead.explain.inputs import (
    Inputs,
    Target,
    call,
    check_differentiable,
    logit,
    mask_of_answers,
)
from polyhead.models.model import TaskModel

Weights = Mapping[str, Tensor] | Iterable[Tensor]
"""What `capture` gives of one stack of self-attention, `[B, H, T, T]` a layer, the first first."""


def rollout(weights: Weights, residual: float = 0.5) -> Tensor:
    """How much of each first token is in each last one: `[B, T, T]`, rows sum to one.

    The mean of the heads, mixed with what the residual carries past it, multiplied through the
    layers (Abnar and Zuidema 2020). residual: that share.
    """
    found: Tensor | None = None
    for layer in _layers(weights):
        mixed = layer.float().mean(1) * (1 - residual)
        mixed = mixed + residual * torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        found = mixed if found is None else mixed @ found
    assert found is not None
    return found


def attention_flow(weights: Weights, token: int = -1, residual: float = 0.5) -> Tensor:
    """The most that can flow from each first token to a last one, `[B, T]`.

    A layer's weights, mixed as for `rollout`, are what its edges can carry (Abnar and Zuidema
    2020). Each is a maximum flow of its own: for texts of some dozens of tokens. Wants scipy.
    """
    try:
        from scipy.sparse import coo_array  # pyright: ignore[reportMissingTypeStubs]
        from scipy.sparse.csgraph import maximum_flow  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigError("attention flow wants scipy: pip install polyhead[explain]") from None

    layers = [layer.float().mean(1) for layer in _layers(weights)]
    batch, tokens = layers[0].shape[:2]
    unit = 2**20  # capacities are whole numbers there
    found = torch.zeros(batch, tokens)
    for row in range(batch):
        edges: list[Tensor] = []
        for depth, layer in enumerate(layers):
            mixed = layer[row] * (1 - residual) + residual * torch.eye(tokens, device=layer.device)
            high, low = (mixed > 0).nonzero(as_tuple=True)
            above, below = (depth + 1) * tokens + high, depth * tokens + low
            edges.append(torch.stack([above, below, (mixed[high, low] * unit).long()]))
        above, below, sizes = torch.cat(edges, 1).cpu().numpy()
        count = (len(layers) + 1) * tokens
        graph = coo_array((sizes.astype("int32"), (above, below)), (count, count)).tocsr()
        top = len(layers) * tokens + token % tokens
        for first in range(tokens):
            found[row, first] = maximum_flow(graph, top, first).flow_value / unit
    return found


def gradient_attention(
    model: TaskModel, inputs: Inputs, target: Target | None = None, where: str = "*"
) -> Tensor:
    """What each first token gives to an answer, by weights times their gradients: `[B, T, T]`.

    Of each layer the positive part of the product, the mean of the heads, added to what came
    through below (Chefer et al. 2021, equations 5 and 6). target: None is the likeliest answer.
    where: the layers of one stack, as of `capture`.
    """
    check_differentiable(model)
    target = target or logit(attention_mask=mask_of_answers(inputs))
    with torch.enable_grad(), capture(model, where, graph=True) as seen:
        # The weights must be part of a graph though no parameter may learn.
        with learned_embeddings(model):
            value = target(call(model, inputs)).sum()
        _layers(seen)
        gradients = torch.autograd.grad(value, list(seen.values()), materialize_grads=True)
    found: Tensor | None = None
    for weights, gradient in zip(seen.values(), gradients, strict=True):
        shares = (weights * gradient).float().clamp(min=0).mean(1).detach()
        found = torch.eye(shares.shape[-1], device=shares.device) if found is None else found
        found = found + shares @ found
    assert found is not None
    return found


def _check_one_stack(names: Iterable[str]) -> None:
    """ConfigError for attentions of several stacks, which do not follow one another."""
    places = [name.partition("@")[0].rpartition(".") for name in names]
    stacks = {f"{stack_of(block)}{part}" for block, _, part in places}
    if len(stacks) > 1:
        raise ConfigError(
            f"attentions of {', '.join(sorted(stacks))} do not follow one another; name the self-"
            "attention of one stack, such as 'encoder'"
        )


def _layers(weights: Weights) -> list[Tensor]:
    if isinstance(weights, Mapping):
        _check_one_stack(weights)
    found = list(weights.values() if isinstance(weights, Mapping) else weights)
    if not found:
        raise ConfigError("there are weights of no layer at all; capture those of a stack first")
    sizes = {tuple(layer.shape[2:]) for layer in found}
    if len(sizes) > 1 or any(q != k for q, k in sizes):
        raise ConfigError(
            f"weights of sizes {sorted(sizes)} do not follow one another; name the self-attention "
            "of one stack, such as 'encoder'"
        )
    return found
