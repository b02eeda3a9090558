"""Objectives: functions `(model, batch) -> Loss`. B batch, T tokens, E width, V vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.compress.formats import PackedWeight
from polyhead.compress.layers import packed_weight, times, times_transposed
from polyhead.kernels.cross_entropy import cross_entropy_
from polyhead.nn.mask import Mask
from polyhead.nn.moe import MixtureOfExperts, load_balance_loss, routing, z_loss

IGNORE = -100
# Below this many logits one product for all rows is fastest, and small beside a block's
# activations; above it the rows go through in chunks of about as many. Smaller ones stay in a
# CPU's cache.
CHUNK_LOGITS, CHUNK_LOGITS_CPU = 1 << 24, 1 << 22
# Weights of the routers' losses where the model's config names none (Fedus et al. 2021; Zoph et
# al. 2022).
BALANCE, ROUTER_Z = 0.01, 0.001


@dataclass(frozen=True)
class LanguageBatch:
    """Tokens and what follows each: `input_ids`, `labels` [B, T]; labels of -100 do not count."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Any = None
    position_ids: Tensor | None = None

    def mask(self) -> Any:
        """What the model takes as `attention_mask`."""
        return self.attention_mask

    def tokens(self) -> int:
        """How many labels count."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        moved = {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in vars(self).items()
        }
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class PackedBatch(LanguageBatch):
    """Several texts in a row, each blind to the others: their numbers `segments` [B, T], -1 where
    nothing stands."""

    segments: Tensor

    def mask(self) -> Mask:
        """By segments."""
        return Mask(segments=self.segments)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqBatch(LanguageBatch):
    """`input_ids` for an encoder; for a decoder `decoder_input_ids`, and the `labels` to answer."""

    decoder_input_ids: Tensor
    decoder_attention_mask: Tensor | None = None


def shifted(labels: Tensor, start_id: int, pad_id: int) -> Tensor:
    """What a decoder reads to answer `labels` [B, T]: a start token, then the labels before."""
    before = labels[:, :-1]
    before = before.masked_fill(before == IGNORE, pad_id)
    return torch.cat([torch.full_like(labels[:, :1], start_id), before], 1)


@dataclass(frozen=True)
class Loss:
    """What an objective found. `total` is a sum over `tokens`, so that sums of batches stay right.

    `parts` holds the terms of `total` by name, without gradient, sums as well; `loss` is the one
    that logs show and validation compares. `answers`, tensors without gradient, is what the
    objective's metric reads of the batch. `logits`, called, gives what the loss was taken of, with
    its gradient: rows of classes [N, C]; what compares two passes (SiFT) needs it.
    """

    total: Tensor
    tokens: int
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    answers: tuple[Tensor, ...] = ()
    logits: Callable[[], Tensor] | None = None


Objective = Callable[[Any, Any], Loss]


def causal_lm(model: Any, batch: LanguageBatch) -> Loss:
    """Cross-entropy of the next token, and the routers' losses where the model has experts."""
    # What a batch does not need is not passed, so that a backbone need not know of it.
    extras = {"attention_mask": batch.mask(), "position_ids": batch.position_ids}
    extras = {name: value for name, value in extras.items() if value is not None}
    with routing(model) as logits:
        hidden = model.backbone(batch.input_ids, **extras)
    nll = head_cross_entropy(model.head, hidden, batch.labels)
    tokens = batch.tokens()
    parts = {"loss": nll, **_router_losses(model, logits, batch, tokens)}
    total = torch.stack(list(parts.values())).sum() if len(parts) > 1 else nll
    shown = {name: part.detach() for name, part in parts.items()}
    counts = batch.labels != IGNORE
    return Loss(total, tokens, shown, logits=lambda: model.head(hidden[counts]))


def _router_losses(
    model: Any, logits: list[Tensor], batch: LanguageBatch, tokens: int
) -> dict[str, Tensor]:
    """Load balance and z loss as sums over `tokens`; nothing for a model without experts."""
    if not (logits and model.training):
        return {}
    top_k = next(m.top_k for m in model.modules() if isinstance(m, MixtureOfExperts))
    mask = batch.attention_mask
    keep = mask.flatten().bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    balance = getattr(model.config, "router_aux_coef", None)
    return {
        "balance": load_balance_loss(logits, top_k, keep)
        * ((BALANCE if balance is None else balance) * tokens),
        "router_z": z_loss(logits, keep) * (ROUTER_Z * tokens),
    }


def head_cross_entropy(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum over labels of -log p, in fp32, of the head's logits for `hidden` [B, T, E]."""
    return smoothed_cross_entropy(head, hidden, labels, 0.0)[0]


def smoothed_cross_entropy(
    head: Any, hidden: Tensor, labels: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The same with a part `smoothing` of each label spread over the vocabulary (Szegedy et al.
    2016); and, without gradient, what it is without that.

    Never holds all logits of a large vocabulary: rows go through in chunks, and each chunk's
    gradient is taken while its logits are there, so nothing is computed twice (Liger Kernel, 2024).
    torch 2.13's F.linear_cross_entropy does the same, but sums in bf16 and is slower on a CPU.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    weight: Tensor | PackedWeight = packed_weight(head) or head.weight
    bias, scale = getattr(head, "bias", None), getattr(head, "scale", 1.0)
    on_cpu = hidden.device.type == "cpu"
    chunk = min(CHUNK_LOGITS, CHUNK_LOGITS_CPU) if on_cpu else CHUNK_LOGITS
    if hidden.shape[0] * weight.shape[0] <= chunk:
        logits = head(hidden).float()
        sums = partial(F.cross_entropy, logits, labels, ignore_index=IGNORE, reduction="sum")
        total = sums(label_smoothing=smoothing)
        return total, sums().detach() if smoothing else total.detach()
    if scale != 1.0:
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    # A chunk adds to a gradient of the weight's size: fewer rows than columns are not worth it.
    rows = max(hidden.shape[1] if on_cpu else 1, chunk // weight.shape[0])
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, smoothing, rows)


def _by_torch(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy_` gives, and the logits' gradient."""
    counts = labels != IGNORE
    target = labels.clamp_min(0)[:, None]
    logp = logits.float()
    logp = logp - logp.logsumexp(-1, keepdim=True)
    nll = -(logp.gather(-1, target)[:, 0] * counts).sum()
    even = -(logp.mean(-1) * counts).sum()
    gradient = logp.exp_()
    if smoothing:
        gradient -= smoothing / logits.shape[1]
    gradient.scatter_add_(-1, target, torch.full_like(gradient[:, :1], smoothing - 1.0))
    gradient *= counts[:, None]
    return nll, even, gradient


def _logits(x: Tensor, w: Tensor | PackedWeight, b: Tensor | None) -> Tensor:
    if isinstance(w, Tensor):
        return F.linear(x, w, b)
    return times(x, w) if b is None else times(x, w) + b


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of x wᵀ + b, gradients made chunk by chunk on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | PackedWeight,
        b: Tensor | None,
        labels: Tensor,
        smoothing: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        wants = [isinstance(part, Tensor) and part.requires_grad for part in (x, w, b)]
        dx = torch.empty_like(x) if wants[0] else None
        dw = None
        if isinstance(w, Tensor) and wants[1]:
            dw = torch.zeros_like(w, dtype=torch.float32)
        db = torch.zeros_like(b, dtype=torch.float32) if b is not None and wants[2] else None
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= w.shape[0]))]
        if labels.device.type == "cpu" and len(wrong):
            raise IndexError(
                f"label {int(wrong[0])} is out of bounds: there are {w.shape[0]} classes"
            )
        nll, even = x.new_zeros(2, dtype=torch.float32)
        for start in range(0, x.shape[0], rows):
            part, target = x[start : start + rows], labels[start : start + rows]
            logits = _logits(part, w, b)
            found = cross_entropy_(logits, target, smoothing, any(wants))
            if found is None:
                *found, logits = _by_torch(logits, target, smoothing)
            nll, even = nll + found[0], even + found[1]
            if not any(wants):
                continue
            dlogits = logits
            if db is not None:
                db += dlogits.sum(0, dtype=torch.float32)
            dlogits = dlogits.to(x.dtype)
            if dx is not None and isinstance(w, Tensor):
                torch.mm(dlogits, w, out=dx[start : start + rows])
            elif dx is not None and not isinstance(w, Tensor):
                dx[start : start + rows] = times_transposed(dlogits, w)
            if dw is not None and x.dtype == torch.float32:
                dw.addmm_(dlogits.T, part)
            elif dw is not None:
                dw += dlogits.T @ part
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = w.dtype, b.dtype if b is not None else None
        total = nll + smoothing * (even - nll)
        nll = nll.clone()
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, scale: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        return (
            None if dx is None else (dx * scale).to(dx.dtype),
            None if dw is None else (dw * scale).to(ctx.dtypes[0]),
            None if db is None else (db * scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )
