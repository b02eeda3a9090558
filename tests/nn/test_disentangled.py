"""Disentangled attention against a gather of every distance, and its buckets against others'."""

from unittest.mock import patch

import pytest
import torch
from tests.nn.parts import Keeps, randomized
from torch import Tensor
from torch.testing import assert_close

from polyhead.nn import attend
from polyhead.nn.disentangled import Disentangled, DisentangledAttention, log_buckets
from polyhead.nn.mask import Mask
from polyhead.nn.norm import LayerNorm

HEADS, WIDTH, MODEL = 3, 5, 15


def by_gathering(
    layer: DisentangledAttention, part: Disentangled, x: Tensor, memory: Tensor, keep: Tensor
) -> Tensor:
    """Every pair's distance looked up, the scores added, the masked ones left out."""
    length = x.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    if part.buckets is not None:
        distance = log_buckets(distance, part.buckets, part.max_distance)
    rows = (distance + part.span).clamp(0, 2 * part.span - 1)
    table = part.norm(part.table.weight)
    q, k, v = (
        linear(given).unflatten(-1, (HEADS, WIDTH))
        for linear, given in ((layer.q, x), (layer.k, memory), (layer.v, memory))
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    if "c2p" in layer.terms:
        keys = (layer.k if layer.shares else layer.distance_k)(table).unflatten(-1, (HEADS, WIDTH))
        scores = scores + torch.einsum("bqhd,qkhd->bhqk", q, keys[rows])
    if "p2c" in layer.terms:
        queries = (layer.q if layer.shares else layer.distance_q)(table)
        queries = queries.unflatten(-1, (HEADS, WIDTH))
        scores = scores + torch.einsum("bkhd,qkhd->bhqk", k, queries[rows])
    scores = (scores * layer.scale).masked_fill(~keep[:, None, None], -torch.inf)
    return layer.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


LENGTHS = [1, 2, 7, 64, 65, 130, 260]
PARTS = {
    "a-row-a-distance": dict(span=140),
    "short-reach": dict(span=4),
    "buckets": dict(span=8, buckets=8, max_distance=30),
    "normed": dict(span=6, norm=True),
}
LAYERS = {
    "own": dict(),
    "shared": dict(shares=True),
    "no-key-bias": dict(key_bias=False),
    "c2p": dict(terms=("c2p",)),
    "p2c-shared": dict(terms=("p2c",), shares=True),
}


def made(
    part: str, layer: str, dtype: torch.dtype = torch.float64
) -> tuple[Disentangled, DisentangledAttention]:
    options = dict(PARTS[part])
    options["norm"] = LayerNorm(MODEL) if options.get("norm") else None
    torch.manual_seed(0)
    position = randomized(Disentangled(MODEL, **options)).to(dtype)
    return position, randomized(DisentangledAttention(MODEL, HEADS, scale=0.3, **LAYERS[layer])).to(
        dtype
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("part", "layer"), [*((part, "own") for part in PARTS), *(("buckets", one) for one in LAYERS)]
)
@pytest.mark.parametrize("at_once", [1, 2**22], ids=["row-by-row", "together"])
def test_equals_a_gather_and_so_do_gradients(
    part: str, layer: str, length: int, at_once: int
) -> None:
    position, attention = made(part, layer)
    x, memory = torch.randn(2, 2, length, MODEL, dtype=torch.float64)
    x.requires_grad_()
    keep = torch.arange(length) < torch.tensor([[length], [max(1, length - 3)]])
    leaves = [x, *position.parameters(), *attention.parameters()]
    at = torch.arange(length)[None]
    mask = Mask(keep=keep)
    with patch.object(attend, "_AT_ONCE", at_once):
        ready = position.prepare(at, at, x.dtype)
        found = attention(x, memory, mask, ready, at)
    expected = by_gathering(attention, position, x, memory, keep)
    answers = (found, expected, attention(x, memory, mask, position, at))
    gradients = [
        torch.autograd.grad(y.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in answers
    ]
    for other, own in zip(answers[1:], gradients[1:], strict=True):
        assert_close(found, other, atol=1e-9, rtol=1e-9)
        assert_close(gradients[0], own, atol=1e-7, rtol=1e-7)


def test_a_probe_sees_the_weights_and_what_it_returns_is_used() -> None:
    position, attention = made("buckets", "shared")
    x = torch.randn(2, 9, MODEL, dtype=torch.float64)
    at = torch.arange(9)[None]
    ready = position.prepare(at, at, x.dtype)
    fused = attention(x, position=ready, at=at)
    seen: list[Tensor] = []
    attention.probes.append(Keeps(seen))
    # The definition takes its scores in fp32.
    assert_close(attention(x, position=ready, at=at), fused, atol=1e-5, rtol=1e-5)
    assert seen[0].shape == (2, HEADS, 9, 9)
    assert_close(seen[0].sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_query_that_sees_nothing_gets_zeros(dtype: torch.dtype) -> None:
    position, attention = made("buckets", "own", dtype)
    x = torch.randn(2, 6, MODEL, dtype=dtype)
    at = torch.arange(6)[None]
    keep = torch.arange(6) < torch.tensor([[6], [0]])
    found = attention(x, mask=Mask(keep=keep), position=position.prepare(at, at, dtype), at=at)
    assert_close(found[1], attention.out.bias.expand(6, MODEL))


def test_dropout_draws_anew_and_only_in_training() -> None:
    position = Disentangled(MODEL, 8, dropout=0.5)
    attention = randomized(DisentangledAttention(MODEL, HEADS))
    x, at = torch.randn(1, 6, MODEL), torch.arange(6)[None]

    def answer() -> Tensor:
        return attention(x, position=position.prepare(at, at, x.dtype), at=at)

    assert not torch.equal(answer(), answer())
    position.eval()
    assert torch.equal(answer(), answer())


def test_as_many_keys_as_queries_are_wanted() -> None:
    position = Disentangled(MODEL, 8)
    with pytest.raises(ValueError, match="6 queries over 4 keys"):
        position.prepare(torch.arange(6)[None], torch.arange(4)[None], torch.float32)


@pytest.mark.parametrize("sizes", [(256, 512), (32, 64), (7, 30), (128, 512), (8, 10)], ids=str)
def test_buckets_are_transformers(sizes: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    distances = torch.arange(-3000, 3001)
    expected = module.make_log_bucket_position(distances, *sizes).long()
    assert torch.equal(log_buckets(distances, *sizes), expected)


def test_buckets_of_version_3() -> None:
    distances = torch.tensor([0, 1, 128, 129, 200, 511, 512, -200, -511])
    expected = [0, 1, 128, 129, 169, 255, 256, -169, -255]
    assert log_buckets(distances, 256, 512).tolist() == expected
