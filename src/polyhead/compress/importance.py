"""How much heads, neurons and experts of a model count: by their weights, or by a loss.

H heads, G of them with keys of their own, D their width, F neurons, N experts, E the model's width.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import Experts, MixtureOfExperts

Batch = Tensor | Mapping[str, Tensor]
"""Token ids `[B, T]`, or what the model is called with by name."""
Loss = Callable[[TaskModel, Any], Tensor]


@dataclass(frozen=True)
class Importance:
    """What each part counts, by the names that its layers have in the backbone.

    heads `[H]` of each attention, neurons `[F]` of each feed-forward and `[N, F]` of each stack of
    experts, experts `[N]` of each mixture. Only parts of one layer are compared.
    """

    heads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    neurons: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    experts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def magnitude(model: TaskModel) -> Importance:
    """By weights alone: the length of what a part writes, if its input is white noise.

    Of a head it is that of its values and its share of the output together, of a neuron the product
    of what it reads with and what it writes with, of an expert that of all its neurons.
    """
    found = Importance()
    with torch.no_grad():
        for name, part in model.backbone.named_modules():
            if isinstance(part, MultiHeadAttention):
                found.heads[name] = _written_by_heads(part)
            elif isinstance(part, FeedForward | GatedFeedForward | Experts):
                found.neurons[name] = _written_by_neurons(part)
        for name, _ in _mixtures(model):
            found.experts[name] = found.neurons[f"{name}.experts"].square().sum(1).sqrt()
    return found


def _written_by_heads(part: MultiHeadAttention) -> Tensor:
    """The Frobenius norm of each head's output by its values `[H]`."""
    out = part.out.weight.float().unflatten(1, (part.num_heads, -1)).transpose(0, 1)  # [H, E, D]
    values = part.v.weight.float().unflatten(0, (part.num_kv_heads, -1))  # [G, D, E]
    values = values.repeat_interleave(part.num_heads // part.num_kv_heads, 0)
    # |A B|² is the sum of AᵀA times BBᵀ, and these are small.
    square = (out.transpose(1, 2) @ out) * (values @ values.transpose(1, 2))
    return square.sum((1, 2)).clamp_min(0).sqrt()


def _written_by_neurons(part: nn.Module) -> Tensor:
    weights = [_weight(part, name) for name in ("gate", "up") if hasattr(part, name)]
    found = _weight(part, "down").float().norm(dim=-2)
    for weight in weights:
        found = found * weight.float().norm(dim=-1)
    return found


def importance(
    model: TaskModel, batches: Tensor | Iterable[Batch], loss: Loss | None = None
) -> Importance:
    """By data: how much the loss would change without a part, to first order.

    batches: token ids `[rows, T]`, each row by itself, or an iterable of what `loss` takes.
    loss:    `(model, batch)` to a scalar; None is the next token's cross-entropy, of decoders and
             of encoder-decoders, whose batches name `input_ids` and `decoder_input_ids`.
    A part's gate is 1 where it is and 0 where it is not; of each batch the gradient by it counts,
    without its sign (Michel et al. 2019, section 4.1; Molchanov et al. 2019, equation 7). An expert
    counts by the weight that tokens give it. Errors: ConfigError where no loss is known, where
    there is no batch, and for weights that are in few bits.
    """
    loss = loss or _default_loss(model)
    outputs, found = _outputs(model), Importance()
    was_training, learned = model.training, [w.requires_grad for w in outputs.values()]
    model.eval()
    try:
        for weight in outputs.values():
            weight.requires_grad_()
        for batch in each_batch(batches):
            _add(found, model, outputs, loss, batch)
    finally:
        model.train(was_training)
        for weight, learns in zip(outputs.values(), learned, strict=True):
            weight.requires_grad_(learns)
    if not (found.heads or found.neurons):
        raise ConfigError("importance is asked of no batch at all: give it some texts")
    return found


def _add(
    found: Importance,
    model: TaskModel,
    outputs: Mapping[str, nn.Parameter],
    loss: Loss,
    batch: Any,
) -> None:
    """What one batch says."""
    with torch.enable_grad(), _loads(model, found):
        value = loss(model, batch)
    grads = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
    for (name, weight), grad in zip(outputs.items(), grads, strict=True):
        # What the loss does not reach, as the layers of a tower above those that are read, is 0.
        grad = torch.zeros_like(weight) if grad is None else grad
        # The gradient by an input's gate is that of all weights which read it, times these.
        by_gate = (weight.detach().float() * grad.float()).sum(-2)
        part, kind = model.backbone.get_submodule(name), found.neurons
        if isinstance(part, MultiHeadAttention):
            by_gate, kind = by_gate.unflatten(0, (part.num_heads, -1)).sum(1), found.heads
        kind[name] = kind.get(name, torch.zeros_like(by_gate)) + by_gate.abs()


@contextmanager
def _loads(model: TaskModel, found: Importance) -> Generator[None]:
    """Add up the weights that tokens give each expert in the forwards run inside."""

    def note(name: str, part: MixtureOfExperts, logits: Tensor) -> None:
        shares = logits.detach().float().softmax(-1)
        chosen, experts = shares.topk(part.top_k, dim=-1)
        if part.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        load = torch.zeros_like(shares[0]).index_add(0, experts.flatten(), chosen.flatten())
        found.experts[name] = found.experts.get(name, torch.zeros_like(load)) + load

    hooks = [
        part.router.register_forward_hook(
            lambda _, __, logits, name=name, part=part: note(name, part, logits)
        )
        for name, part in _mixtures(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def each_batch(batches: Tensor | Iterable[Batch]) -> Iterator[Batch]:
    """Rows of token ids one by one, or what there is."""
    return iter(batches[:, None] if isinstance(batches, Tensor) else batches)


def _default_loss(model: TaskModel) -> Loss:
    kind = getattr(model.config, "kind", "decoder")
    if model.head_kind != "lm" or kind not in ("decoder", "encoder-decoder", "image-text"):
        raise ConfigError(
            f"{model.config.model_type} with the head {model.head_kind!r} has no loss of its own: "
            "give importance one as loss="
        )
    return _next_token_loss


def _next_token_loss(model: TaskModel, batch: Batch) -> Tensor:
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids = named.get("decoder_input_ids", named["input_ids"])
    logits = model(**named)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _outputs(model: TaskModel) -> dict[str, nn.Parameter]:
    """The matrix that each attention, feed-forward and stack of experts writes with."""
    found: dict[str, nn.Parameter] = {}
    for name, part in model.backbone.named_modules():
        if isinstance(part, MultiHeadAttention | FeedForward | GatedFeedForward | Experts):
            weight = _weight(part, "out" if isinstance(part, MultiHeadAttention) else "down")
            if not isinstance(weight, nn.Parameter):
                raise ConfigError(f"{name} is in few bits: importance is asked of the floats")
            found[name] = weight
    return found


def _weight(part: nn.Module, name: str) -> Any:
    found = getattr(part, name)
    return found.weight if isinstance(found, nn.Module) else found


def _mixtures(model: TaskModel) -> list[tuple[str, MixtureOfExperts]]:
    named = model.backbone.named_modules()
    return [(name, part) for name, part in named if isinstance(part, MixtureOfExperts)]
