"""Attention weights seen from outside."""

import pytest
import torch

import polyhead as ph
from polyhead.nn.attention import MultiHeadAttention

SIZES = dict(vocab_size=31, d_model=16, d_ff=24, num_layers=3, num_heads=4, max_seq_len=32)


@pytest.fixture
def model():
    return ph.build("llama", seed=0, num_kv_heads=2, **SIZES).eval()


def test_weights_of_the_named_layer_and_no_other(model) -> None:
    ids = torch.randint(0, 31, (2, 9))
    plain = model(ids)
    with ph.capture(model, "layers.1") as seen:
        watched = model(ids)
    assert list(seen) == ["backbone.layers.1.attention"]
    weights = seen["backbone.layers.1.attention"]
    assert weights.shape == (2, 4, 9, 9)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 9), atol=1e-5)
    assert weights.triu(1).abs().max() == 0
    assert torch.allclose(plain, watched, atol=1e-5)


def test_patterns_and_reduction(model) -> None:
    ids = torch.randint(0, 31, (1, 5))
    with ph.capture(model, "*.layers.[01].*", reduce=lambda w: w.mean(1)) as seen:
        model(ids)
    assert sorted(seen) == ["backbone.layers.0.attention", "backbone.layers.1.attention"]
    assert all(w.shape == (1, 5, 5) for w in seen.values())


def test_nothing_stays_behind_even_after_an_error(model) -> None:
    with pytest.raises(RuntimeError), ph.capture(model):
        raise RuntimeError
    attentions = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    assert attentions
    assert all(not attention.probes for attention in attentions)


def test_layer_1_is_not_layer_10(model) -> None:
    with pytest.raises(ph.ConfigError, match=r"layers\.7"), ph.capture(model, "layers.7"):
        pass
