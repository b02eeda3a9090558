"""Norms, feed-forwards, embeddings, heads and blocks against their formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.nn.parts import B, E, H, T, randomized
from torch import Tensor, nn
from torch.testing import assert_close

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.block import PostNormBlock, TransformerBlock
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.feedforward import ACTIVATIONS, FeedForward, GatedFeedForward
from polyhead.nn.head import LanguageHead
from polyhead.nn.mask import Mask
from polyhead.nn.norm import NORMS, RMSNorm, make_norm

CLOSE = dict(atol=1e-5, rtol=0.0)
EPS = 1e-3


def test_norms_are_torch_s() -> None:
    x = torch.randn(B, T, E) * 3 + 1
    weight, bias = torch.randn(E), torch.randn(E)
    expected = {
        "layer": F.layer_norm(x, (E,), weight, bias, EPS),
        "layer_without_bias": F.layer_norm(x, (E,), weight, None, EPS),
        "rms": F.rms_norm(x, (E,), weight, EPS),
    }
    assert expected.keys() == NORMS.keys()
    for kind, answer in expected.items():
        norm = make_norm(kind, E, EPS)
        state = {"weight": weight, "bias": bias}
        norm.load_state_dict({name: state[name] for name in norm.state_dict()})
        assert_close(norm(x), answer, **CLOSE)


@pytest.mark.parametrize("shape", [4, (3, 4)])
def test_rms_norm_and_its_gradient(shape: int | tuple[int, ...]) -> None:
    norm = randomized(RMSNorm(shape, EPS))
    x = torch.randn(2, 3, 4, requires_grad=True)
    dims = (-1,) if isinstance(shape, int) else (-2, -1)
    expected = norm.weight * x / (x.square().mean(dims, keepdim=True) + EPS).sqrt()
    leaves = [x, norm.weight]
    assert_close(norm(x), expected, **CLOSE)
    pull = torch.randn_like(x)
    ours = torch.autograd.grad((norm(x) * pull).sum(), leaves)
    for one, other in zip(ours, torch.autograd.grad((expected * pull).sum(), leaves), strict=True):
        assert_close(one, other, **CLOSE)


def test_rms_norm_counts_in_fp32() -> None:
    x = (torch.randn(4, 512) * 200).bfloat16()
    norm = RMSNorm(512)
    exact = norm(x.float())
    assert_close(norm.bfloat16()(x).float(), exact, atol=0.02, rtol=0.01)


FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bias", [True, False])
def test_feedforwards_are_their_formulas(name: str, bias: bool) -> None:
    assert FORMULAS.keys() <= ACTIVATIONS.keys()
    x, act = torch.randn(B, T, E), FORMULAS[name]
    plain = randomized(FeedForward(E, 20, name, bias), 0.3)
    assert_close(plain(x), plain.down(act(plain.up(x))), **CLOSE)
    gated = randomized(GatedFeedForward(E, 20, name, bias), 0.3)
    assert_close(gated(x), gated.down(act(gated.gate(x)) * gated.up(x)), **CLOSE)
    assert (plain.up.bias is not None) == (gated.down.bias is not None) == bias


def make_block(kind: type[TransformerBlock], dropout: float = 0.0) -> TransformerBlock:
    block = kind(
        MultiHeadAttention(E, H, num_kv_heads=2),
        GatedFeedForward(E, 24),
        partial(nn.LayerNorm, E),
        cross=MultiHeadAttention(E, H, kv_dim=12),
        dropout=dropout,
    )
    return randomized(block, 0.2)


def test_blocks_are_their_equations() -> None:
    x, memory = torch.randn(B, T, E), torch.randn(B, 7, 12)
    mask, seen = Mask(causal=True), Mask(keep=torch.arange(7) < torch.tensor([[7], [2], [4]]))

    def parts(block: TransformerBlock, x: Tensor, which: str) -> Tensor:
        assert block.cross is not None
        if which == "self":
            return block.attention(x, mask=mask)
        return block.cross(x, memory, seen) if which == "cross" else block.ffn(x)

    pre = make_block(TransformerBlock)
    y = x + parts(pre, pre.attention_norm(x), "self")
    y = y + parts(pre, pre.cross_norm(y), "cross")
    y = y + parts(pre, pre.ffn_norm(y), "ffn")
    assert_close(pre(x, mask, memory=memory, memory_mask=seen), y, **CLOSE)

    post = make_block(PostNormBlock)
    y = post.attention_norm(x + parts(post, x, "self"))
    y = post.cross_norm(y + parts(post, y, "cross"))
    y = post.ffn_norm(y + parts(post, y, "ffn"))
    assert_close(post(x, mask, memory=memory, memory_mask=seen), y, **CLOSE)


@pytest.mark.parametrize("kind", [TransformerBlock, PostNormBlock])
def test_a_block_drops_while_training_only(kind: type[TransformerBlock]) -> None:
    block = make_block(kind, dropout=0.5)
    x, memory = torch.randn(B, T, E), torch.randn(B, 7, 12)
    assert not torch.equal(block(x, memory=memory), block(x, memory=memory))
    block.eval()
    assert torch.equal(block(x, memory=memory), block(x, memory=memory))


@pytest.mark.parametrize("kind", [TransformerBlock, PostNormBlock])
def test_half_precision_stays_near(kind: type[TransformerBlock]) -> None:
    block = make_block(kind)
    x, memory = torch.randn(B, T, E), torch.randn(B, 7, 12)
    exact = block(x, Mask(causal=True), memory=memory)
    rough = block.bfloat16()(x.bfloat16(), Mask(causal=True), memory=memory.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), exact, atol=0.2, rtol=0.05)


def test_embedding_and_head() -> None:
    embedding, head = TokenEmbedding(9, E, scale=3.0), LanguageHead(E, 9, scale=0.5)
    ids = torch.tensor([[0, 8, 3], [1, 1, 2]])
    x = embedding(ids)
    assert_close(x, embedding.weight[ids] * 3.0)
    head.tie(embedding)
    assert head.weight is embedding.weight
    assert_close(head(x), x @ embedding.weight.T * 0.5)
    assert LanguageHead(E, 9, bias=True).bias is not None
    assert LanguageHead(E, 9).bias is None


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([[0, 9]]), "token id 9 is outside the vocabulary of 9"),
        (torch.tensor([[-1, 3]]), "token id -1 is outside"),
        (torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([[0.5]]), "torch.float32"),
        (torch.zeros(2, 0, dtype=torch.long), "hold no tokens"),
    ],
)
def test_ids_that_cannot_be_are_refused(ids: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenEmbedding(9, E)(ids)


def test_names_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'mish'; use one of relu, gelu"):
        FeedForward(E, 8, "mish")
    with pytest.raises(ValueError, match="norm is 'batch'; use one of layer"):
        make_norm("batch", E, EPS)
