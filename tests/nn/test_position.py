"""Positions against independent statements: formulas, double loops, transformers."""

import math
from typing import Any

import pytest
import torch
from tests.nn.parts import DEVICE, B, D, H, T, randomized
from torch import Tensor
from torch.testing import assert_close

from polyhead.models.rope import make_rotary, read_scaling
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.mask import Mask
from polyhead.nn.position import (
    Alibi,
    LearnedPositions,
    Shaw,
    SinusoidalPositions,
    T5Bias,
    alibi_slopes,
)
from polyhead.nn.rotary import DynamicRotary, Rotary

AT = torch.arange(T, device=DEVICE)[None]


def test_rotary_turns_pairs_in_the_plane() -> None:
    rotary = Rotary(D, base=100.0)
    x = torch.randn(B, H, T, D)
    turned = rotary.rotate(x, AT)
    for i in range(D // 2):
        pair, angle = torch.complex(x[..., i], x[..., i + D // 2]), 100.0 ** (-2 * i / D)
        turn = torch.polar(torch.ones(T), torch.arange(T) * angle)
        expected = pair * turn
        assert_close(turned[..., i], expected.real, atol=1e-6, rtol=1e-5)
        assert_close(turned[..., i + D // 2], expected.imag, atol=1e-6, rtol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    rotary = Rotary(D)
    q, k = torch.randn(2, 1, 1, T, D).unbind()
    near = rotary.rotate(q, AT) @ rotary.rotate(k, AT).mT
    far = rotary.rotate(q, AT + 900) @ rotary.rotate(k, AT + 900).mT
    assert_close(near, far, atol=1e-4, rtol=1e-4)


def test_rotary_prepared_is_rotary() -> None:
    rotary, x = Rotary(D), torch.randn(B, H, T, D)
    at = torch.randint(0, 50, (B, T))
    assert torch.equal(rotary.prepare(at, at, x.dtype).rotate(x, at), rotary.rotate(x, at))


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("length", [1, 100, 256, 300, 1000])
def test_scalings_are_transformers(scaling: dict[str, Any], head_dim: int, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )
    at = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), at)
    rotary = make_rotary(head_dim, 5000.0, read_scaling(scaling), 256)
    x = torch.randn(1, 2, length, head_dim)
    half = torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], dim=-1)
    expected = x * cos[:, None] + half * sin[:, None]
    # At far positions an angle of 1000 radians holds seven digits, no more.
    assert_close(rotary.rotate(x, at), expected, atol=5e-4, rtol=0.0)
    prepared = rotary.prepare(at, at, x.dtype)
    assert_close(prepared.rotate(x, at), expected, atol=5e-4, rtol=0.0)


def test_dynamic_rows_do_not_depend_on_each_other() -> None:
    rotary = make_rotary(D, 100.0, {"rope_type": "dynamic", "factor": 4.0}, 6)
    assert isinstance(rotary, DynamicRotary)
    at = torch.stack([torch.arange(T), torch.arange(T) + 20, torch.where(AT[0] < 4, AT[0], -1)])
    x = torch.randn(B, H, T, D)
    together = rotary.rotate(x, at)
    for row in range(B):
        alone = rotary.rotate(x[row : row + 1], at[row : row + 1])
        assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 71])
def test_alibi_is_bloom_s(num_heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    length = 7
    theirs = bloom.build_alibi_tensor(torch.ones(1, length), num_heads, torch.float32)
    theirs = theirs.view(num_heads, length)  # slope * key
    assert_close(alibi_slopes(num_heads), theirs[:, 1])
    at = torch.arange(length)[None]
    ours = Alibi(num_heads).table(at, at)[0]
    # Bloom leaves out the query's own part, which softmax takes away again.
    for q in range(length):
        row = ours[:, q, : q + 1]
        assert_close(row - row[:, :1], theirs[:, : q + 1] - theirs[:, :1])


def test_alibi_counts_positions_of_each_row() -> None:
    at, keys_at = torch.randint(0, 30, (B, 4)), torch.randint(0, 30, (B, 6))
    table = Alibi(H).table(at, keys_at)
    for b in range(B):
        for q in range(4):
            expected = -alibi_slopes(H)[:, None] * (keys_at[b] - at[b, q]).abs()
            assert_close(table[b, :, q], expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
def test_t5_buckets_are_transformers(
    bidirectional: bool, num_buckets: int, max_distance: int
) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-1500, 1501)[None]
    ours = T5Bias(H, num_buckets, max_distance, bidirectional)
    theirs = t5.T5Attention._relative_position_bucket(
        distance, bidirectional, num_buckets, max_distance
    )
    assert torch.equal(ours.buckets(distance), theirs)


def test_t5_bias_looks_its_table_up() -> None:
    part = randomized(T5Bias(H))
    at, keys_at = torch.randint(0, 300, (B, 3)), torch.randint(0, 300, (B, 5))
    bias = part.biases(at, keys_at)
    for b, q, k in torch.cartesian_prod(*map(torch.arange, (B, 3, 5))).tolist():
        bucket = part.buckets(keys_at[b, k] - at[b, q])
        assert torch.equal(bias[b, :, q, k], part.table.weight[bucket])
    prepared = part.prepare(at, keys_at, torch.float32)
    q = torch.randn(B, H, 3, D)
    assert torch.equal(prepared.bias(q, q, at, keys_at, None), bias)  # pyright: ignore


@pytest.mark.parametrize("groups", [1, 4])
def test_shaw_is_the_paper_s_double_loop(groups: int) -> None:
    """Equations 3 and 4, one pair of positions at a time, in float64."""
    layer = randomized(MultiHeadAttention(H * D, H, num_kv_heads=groups), 0.2).double()
    shaw, x = randomized(Shaw(D, 3)).double(), torch.randn(2, T, H * D).double()
    y = layer(x, mask=Mask(causal=True), position=shaw)
    q, k, v = layer.q(x), layer.k(x), layer.v(x)
    z = torch.zeros(2, T, H * D).double()
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, H, T))).tolist():
        g = h // (H // groups)
        mine, theirs = slice(h * D, (h + 1) * D), slice(g * D, (g + 1) * D)
        clipped = [max(-3, min(3, j - i)) + 3 for j in range(i + 1)]
        scores = torch.stack(
            [
                q[b, i, mine] @ (k[b, j, theirs] + shaw.keys.weight[c]) / math.sqrt(D)
                for j, c in enumerate(clipped)
            ]
        )
        for j, share in enumerate(scores.softmax(0)):
            z[b, i, mine] += share * (v[b, j, theirs] + shaw.for_values.weight[clipped[j]])
    # The weights are softmaxed in fp32.
    assert_close(y, layer.out(z), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("d_model", [2, 7, 16])
def test_sinusoids_are_the_paper_s(d_model: int) -> None:
    at = torch.tensor([[0, 1, 2, 77], [5, 5, 300, 0]])
    table: Tensor = SinusoidalPositions(d_model)(at)
    assert table.shape == (2, 4, d_model)
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        for i in range(d_model):
            angle = int(at[b, t]) / 10000 ** ((i - i % 2) / d_model)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[b, t, i].item() == pytest.approx(expected, abs=2e-5)


def test_learned_positions_are_their_rows() -> None:
    part = LearnedPositions(9, 4)
    at = torch.tensor([[0, 8, 3], [1, 2, -1]])  # -1 is padding
    assert torch.equal(part(at)[0], part.weight[at[0]])
    assert torch.equal(part(at)[1, :2], part.weight[at[1, :2]])
    assert part(at).isfinite().all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 5"):
        Rotary(5)
