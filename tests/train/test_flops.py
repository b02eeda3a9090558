"""The counted FLOPs against those that torch sees."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polyhead.errors import ConfigError
from polyhead.models.assemble import build
from polyhead.train.flops import mean_keys, training_flops
from polyhead.train.objectives import LanguageBatch, causal_lm

B, T, V = 2, 12, 24
LAYERS = {"d_model": 16, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
MODELS = {
    "bigram": {"d_model": 8},
    "window_mlp": {"d_model": 8, "embedding_width": 4, "window": 3},
    "window_mlp direct": {"d_model": 8, "embedding_width": 4, "window": 3, "direct": True},
    "lstm": {"d_model": 8, "num_layers": 2},
    "gpt2": LAYERS,
    "llama": {**LAYERS, "d_ff": 40, "num_kv_heads": 2, "tie_embeddings": True},
    "mixtral": {**LAYERS, "d_ff": 24, "num_experts": 4, "top_k": 2, "num_kv_heads": 4},
    "qwen2_moe": {
        **LAYERS, "d_ff": 24, "d_expert": 12, "num_experts": 4, "top_k": 1, "shared_d_ff": 20,
        "num_kv_heads": 4,
    },
}  # fmt: skip


def seen_by_torch(model):
    """FLOPs of one step, with attention and the LSTM as plain products."""
    ids = torch.randint(V, (B, T + 1))
    batch = LanguageBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    plain = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        causal_lm(model, batch).total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_is_what_torch_counts(name):
    family = name.split()[0]
    model = build(family, seed=0, vocab_size=V, **MODELS[name]).train()
    # Torch counts all T keys of causal attention: as many as a text twice as long has on average.
    counted = B * T * training_flops(model, 2 * T)
    if family == "lstm":
        # No gradient of the state before the text is asked for.
        counted -= MODELS[name]["num_layers"] * B * 2 * 8 * 32
    assert counted == seen_by_torch(model)


def test_a_tied_head_costs_as_much():
    sizes = {**LAYERS, "d_ff": 40, "vocab_size": V}
    tied, apart = (build("llama", tie_embeddings=tie, **sizes) for tie in (True, False))
    assert training_flops(tied, T) == training_flops(apart, T)


@pytest.mark.parametrize(("context", "window"), [(64, None), (64, 64), (64, 100), (64, 8), (1, 1)])
def test_mean_keys(context, window):
    width = min(window or context, context)
    exact = sum(min(t + 1, width) for t in range(context)) / context
    # Positions are taken as continuous, so that a layer that sees all has T / 2.
    assert mean_keys(context, window) == pytest.approx(exact - width / (2 * context))
    assert mean_keys(context) == context / 2


def test_a_window_is_cheaper():
    sizes = {**LAYERS, "d_ff": 40, "vocab_size": V, "num_kv_heads": 4}
    full, near = (build("mistral", window=window, **sizes) for window in (None, 4))
    weights = 2 * 4 * 16 * (16 - mean_keys(32, 4)) * 3
    assert training_flops(full, 32) - training_flops(near, 32) == weights


def test_what_is_not_causal_is_refused():
    bert = build("bert", vocab_size=V, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError):
        training_flops(bert, T)
    with pytest.raises(ConfigError, match="context is 0"):
        training_flops(build("bigram", vocab_size=V), 0)
