"""Attention over projected queries, keys and values: the definition, and the fused path."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.nn.dropout import dropout
from polyhead.nn.mask import EVERYTHING, Lowered

_AT_ONCE = 2**21


def weights(
    q: Tensor, k: Tensor, mask: Lowered = EVERYTHING, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Softmax of the scaled, biased and masked scores (Vaswani et al. 2017, equation 1).

    q `[B, H, Q, D]`, k `[B, G, K, D]` with H a multiple of G, bias `[B|1, H|1, Q, K]`; returns
    `[B, H, Q, K]` in q's dtype. A query that may see nothing gets zeros.
    """
    allowed = mask.boolean(q.shape[2], k.shape[2], q.device)
    return shares(scores(q, k, bias, scale), allowed).to(q.dtype)


def scores(q: Tensor, k: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Scaled and biased, of `[B, H, Q, D]` and `[B, G, K, D]`: `[B, H, Q, K]` fp32."""
    found = (q @ expand_heads(k, q.shape[1]).transpose(-1, -2)).float() * scale
    return found if bias is None else found + bias


def shares(scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The softmax over what is allowed, `[B|1, H|1, Q, K]`; zeros where a row may see nothing."""
    if allowed is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~allowed, 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lowered = EVERYTHING,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """`weights(...) @ v` by torch's fused kernel; `[B, H, Q, D]`, equal to the definition."""
    if _trains_half_on_cpu(q) and q.numel() and k.numel():
        return _written_out(q, k, v, mask, bias, scale, dropout)
    fused_mask = mask.dense
    if bias is not None:
        allowed = mask.boolean(q.shape[2], k.shape[2], q.device)
        if allowed is not None:
            # Adding is several times faster than filling what has the size of both.
            bias = bias + bias.new_zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
        fused_mask = bias.to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=fused_mask,
        dropout_p=dropout,
        is_causal=mask.is_causal and bias is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _trains_half_on_cpu(q: Tensor) -> bool:
    """Where torch 2.13's fused kernel is slower, backward above all, than plain products."""
    is_half_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return is_half_on_cpu and q.requires_grad and q.shape[2] <= 1024


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Lowered,
    bias: Tensor | None,
    scale: float,
    rate: float,
) -> Tensor:
    """The definition a few rows at a time; the backward pass keeps the shares.

    In q's dtype, but where there is a bias in float32 up to the shares: neither it nor the scores
    that it stands against (T5 does not scale them) are small enough for a sum of 8 bits.
    """
    kind = q.dtype if bias is None else torch.float32
    num_heads, num_queries, num_keys = q.shape[1], q.shape[2], k.shape[2]
    allowed = mask.boolean(num_queries, num_keys, q.device)
    if allowed is not None:
        hidden = torch.zeros(allowed.shape, dtype=kind, device=q.device)
        hidden.masked_fill_(~allowed, torch.finfo(kind).min)
        bias = hidden if bias is None else bias.to(kind) + hidden
    rows = rows_at_once(q, k)
    biases = [bias] * math.ceil(len(q) / rows)
    if bias is not None and len(bias) > 1:
        biases = list(bias.split(rows))
    k, v = expand_heads(k, num_heads).transpose(-1, -2), expand_heads(v, num_heads)
    parts: list[Tensor] = []
    q = q.to(kind) * scale
    for a, b, c, own in zip(q.split(rows), k.split(rows), v.split(rows), biases, strict=True):
        scores = a @ b.to(kind)
        scores = scores if own is None else scores + own
        parts.append(dropout(scores.softmax(-1).to(c.dtype), rate) @ c)
    found = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found if allowed is None else found.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def rows_at_once(q: Tensor, k: Tensor) -> int:
    """Of a batch, as many rows as have scores that a CPU keeps near at hand."""
    return max(1, _AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[2]))


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat `[B, G, K, D]` so that every query head has a key/value head: `[B, H, K, D]`."""
    groups = x.shape[1]
    return x if groups == num_heads else x.repeat_interleave(num_heads // groups, dim=1)
