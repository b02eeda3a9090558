"""The attention layer: against torch's, its probes, its query and key norms, its seams."""

import pytest
import torch
from tests.nn.parts import DEVICE, POSITIONS, B, D, E, H, Keeps, T, randomized
from torch import Tensor, nn
from torch.testing import assert_close

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import GrowingCache
from polyhead.nn.mask import Mask
from polyhead.nn.norm import RMSNorm
from polyhead.nn.probe import Probe
from polyhead.nn.rotary import Rotary

CLOSE = dict(atol=1e-5, rtol=0.0)
PADDED = torch.arange(T, device=DEVICE) < torch.tensor([[T], [2], [5]], device=DEVICE)
KEEP = torch.arange(7, device=DEVICE) < torch.tensor([[7], [2], [5]], device=DEVICE)


def twins(kv_dim: int | None, bias: bool) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Our layer and torch's with the same weights."""
    ours = randomized(MultiHeadAttention(E, H, kv_dim=kv_dim, bias=bias), 0.2)
    theirs = nn.MultiheadAttention(E, H, bias=bias, kdim=kv_dim, vdim=kv_dim, batch_first=True)
    with torch.no_grad():
        if kv_dim is None:
            theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        else:
            theirs.q_proj_weight.copy_(ours.q.weight)
            theirs.k_proj_weight.copy_(ours.k.weight)
            theirs.v_proj_weight.copy_(ours.v.weight)
        theirs.out_proj.weight.copy_(ours.out.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
            theirs.out_proj.bias.copy_(ours.out.bias)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_dim", [None, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_is_torch_s(bias: bool, kv_dim: int | None, padded: bool) -> None:
    ours, theirs = twins(kv_dim, bias)
    x, memory = torch.randn(B, T, E), torch.randn(B, 7, kv_dim or E)
    seen: list[Tensor] = []
    ours.probes.append(Keeps(seen))
    y = ours(x, memory, Mask(keep=KEEP) if padded else None)
    expected, shares = theirs(
        x, memory, memory, key_padding_mask=~KEEP if padded else None, average_attn_weights=False
    )
    assert_close(y, expected, **CLOSE)
    assert_close(seen[0], shares, **CLOSE)
    ours.probes.clear()
    assert_close(ours(x, memory, Mask(keep=KEEP) if padded else None), expected, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_torch_s(bias: bool) -> None:
    ours, theirs = twins(None, bias)
    x = torch.randn(B, T, E)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_close(ours(x), theirs(x, x, x)[0], **CLOSE)
    expected = theirs(x, x, x, attn_mask=future)[0]
    assert_close(ours(x, mask=Mask(causal=True)), expected, **CLOSE)


def test_probes_see_the_weights_and_may_replace_them() -> None:
    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=2), 0.2)
    x, mask = torch.randn(B, T, E), Mask(causal=True)
    seen: list[Tensor] = []

    class KnockOut(Probe):
        def weights(self, weights: Tensor) -> Tensor:
            return weights.index_fill(1, torch.tensor([1]), 0.0)

    plain = layer(x, mask=mask)
    layer.probes = [Keeps(seen)]
    assert_close(layer(x, mask=mask), plain, **CLOSE)
    assert seen[0].shape == (B, H, T, T)
    assert_close(seen[0].sum(-1), torch.ones(B, H, T))
    assert seen[0].triu(1).eq(0).all()

    layer.probes = [KnockOut(), Keeps(seen)]  # the second sees what the first made
    without = layer(x, mask=mask)
    assert seen[1][:, 1].eq(0).all()
    assert torch.equal(seen[1][:, 0], seen[0][:, 0])
    values = layer.v(x).unflatten(-1, (2, D)).repeat_interleave(2, dim=2)
    heads = torch.einsum("bhqk,bkhd->bqhd", seen[1], values).flatten(2)
    assert_close(without, layer.out(heads), **CLOSE)

    layer.probes = []
    assert torch.equal(layer(x, mask=mask), plain)


class Everything(Probe):
    """Notes every stage, of a few queries at a time."""

    def __init__(self, queries_at_once: int | None) -> None:
        self.queries_at_once = queries_at_once
        self.parts: dict[str, list[Tensor]] = {"scores": [], "weights": []}

    def projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.q, self.k, self.v = q, k, v
        return q, k, v

    def scores(self, scores: Tensor) -> Tensor:
        self.parts["scores"].append(scores)
        return scores

    def weights(self, weights: Tensor) -> Tensor:
        self.parts["weights"].append(weights)
        return weights

    def heads(self, heads: Tensor) -> Tensor:
        self.found = heads
        return heads


@pytest.mark.parametrize("at_once", [None, 1, 3, T, 100])
@pytest.mark.parametrize("mask", [Mask(), Mask(causal=True), Mask(causal=True, keep=PADDED)])
@pytest.mark.parametrize("position", ["none", "alibi", "shaw", "rotary"])
def test_a_probe_sees_every_stage_a_few_queries_at_a_time(
    at_once: int | None, mask: Mask, position: str
) -> None:
    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=2), 0.2)
    where, x = POSITIONS[position](), torch.randn(B, T, E)
    plain = layer(x, mask=mask, position=where)
    probe = Everything(at_once)
    layer.probes = [probe]
    assert_close(layer(x, mask=mask, position=where), plain, **CLOSE)
    scores, weights = (torch.cat(probe.parts[name], 2) for name in ("scores", "weights"))
    assert len(probe.parts["scores"]) == -(-T // min(T, at_once or T))
    allowed = mask.dense(T, T, DEVICE)
    assert torch.equal(scores.isfinite(), allowed.expand(B, H, T, T))
    assert_close(scores.softmax(-1).nan_to_num(), weights, **CLOSE)
    assert (probe.q.shape, probe.k.shape, probe.v.shape) == ((B, H, T, D), *[(B, 2, T, D)] * 2)
    assert_close(layer.out(probe.found.transpose(1, 2).flatten(2)), plain, **CLOSE)


@pytest.mark.parametrize("kind", ["head", "width"])
def test_queries_and_keys_are_normed_before_they_turn(kind: str) -> None:
    def norm(heads: int, head_dim: int) -> nn.Module:
        return RMSNorm(head_dim if kind == "head" else (heads, head_dim), 1e-5)

    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=2, qk_norm=norm), 0.3)
    rotary, x = Rotary(D), torch.randn(B, T, E)
    at = torch.arange(T)[None]

    def prepared(projected: Tensor, weight: Tensor, heads: int) -> Tensor:
        if kind == "width":  # one mean over all heads together
            wide = projected / (projected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            split = (wide * weight.flatten()).view(B, T, heads, D)
        else:
            split = projected.view(B, T, heads, D)
            split = weight * split / (split.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return rotary.rotate(split.transpose(1, 2), at)

    q = prepared(layer.q(x), layer.q_norm.weight, H)
    k = prepared(layer.k(x), layer.k_norm.weight, 2).repeat_interleave(2, dim=1)
    v = layer.v(x).view(B, T, 2, D).transpose(1, 2).repeat_interleave(2, dim=1)
    heads = (q @ k.mT / D**0.5).softmax(-1) @ v
    assert_close(layer(x, position=rotary), layer.out(heads.transpose(1, 2).flatten(2)), **CLOSE)


def test_sizes_and_scale() -> None:
    layer = MultiHeadAttention(
        E, H, num_kv_heads=1, head_dim=6, kv_dim=10, bias=False, out_bias=True, scale=0.7
    )
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "q.weight": (24, E),
        "k.weight": (6, 10),
        "v.weight": (6, 10),
        "out.weight": (E, 24),
        "out.bias": (E,),
    }
    x, memory = torch.randn(B, T, E), torch.randn(B, 5, 10)
    unscaled = layer(x, memory)
    with torch.no_grad():
        layer.q.weight.mul_(0.7)
    layer.scale = 1.0
    assert_close(layer(x, memory), unscaled, **CLOSE)


def test_dropout_is_for_training_alone() -> None:
    layer = randomized(MultiHeadAttention(E, H, dropout=0.5), 0.2)
    x = torch.randn(B, T, E)
    still = layer.eval()(x)
    assert torch.equal(layer(x), still)
    layer.train()
    torch.manual_seed(1)
    rough = torch.stack([layer(x) for _ in range(400)])
    assert not torch.equal(rough[0], rough[1])
    assert_close(rough.mean(0), still, atol=0.25, rtol=0.0)
    layer.probes = [Probe()]
    assert not torch.equal(layer(x), layer(x))


def test_direct_use_counts_its_own_positions() -> None:
    """As in the documents: no `at`; the cache advances by itself."""
    attention = randomized(MultiHeadAttention(E, H, num_kv_heads=1), 0.2).requires_grad_(False)
    rotary, x = Rotary(D), torch.randn(B, T, E)
    layer_cache = GrowingCache(B, 1, D, x)
    pieces = [
        attention(piece, mask=Mask(causal=True), position=rotary, cache=layer_cache)
        for piece in x.split((4, 1, 5), 1)
    ]
    whole = attention(x, mask=Mask(causal=True), position=rotary, at=torch.arange(T)[None])
    assert_close(torch.cat(pieces, 1), whole, **CLOSE)


def test_a_lowered_mask_is_taken_as_it_is() -> None:
    layer, x = randomized(MultiHeadAttention(E, H), 0.2), torch.randn(B, T, E)
    for mask in (Mask(causal=True), Mask(causal=True, window=2)):
        lowered = mask.lower(T, T, x.device)
        assert torch.equal(layer(x, mask=lowered), layer(x, mask=mask))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_heads=3), "32 does not divide into 3 heads"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiHeadAttention(E, **options)
