"""Tiny random models of transformers, saved as its users save them: the parity tests' table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
GPT2_SIZES = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)


@dataclass(frozen=True)
class Case:
    """A class of transformers and the options of one model of it."""

    name: str
    kind: str  # GPT2, Llama ...: the start of the class names
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        sizes = GPT2_SIZES if self.kind == "GPT2" else SIZES
        # No ids beyond the tiny vocabulary: the library warns of them.
        ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        config = getattr(transformers, self.kind + "Config")(**{**sizes, **ids, **self.options})
        ending = "LMHeadModel" if self.kind == "GPT2" else "ForCausalLM"
        model = getattr(transformers, self.kind + ending)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Ones and zeros would hide a norm or a bias that is not read.
                if "norm" in name or "ln_" in name or name.endswith("bias"):
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def save(self, folder: Path, seed: int = 0) -> Any:
        model = self.make(seed)
        model.save_pretrained(folder)
        return model


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_RAW = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=8.0,
    beta_slow=2.0,
    truncate=False,
    mscale=0.7,
    mscale_all_dim=0.3,
)

CASES = [
    Case("gpt2", "GPT2"),
    Case("gpt2-untied-wide", "GPT2", dict(tie_word_embeddings=False, n_inner=40, n_head=2)),
    Case("gpt2-scaled", "GPT2", dict(scale_attn_by_inverse_layer_idx=True, n_layer=2)),
    Case("gpt2-unscaled-relu", "GPT2", dict(scale_attn_weights=False, activation_function="relu")),
    Case("llama", "Llama"),
    Case("llama-mqa-tied", "Llama", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    Case("llama-biases", "Llama", dict(attention_bias=True, mlp_bias=True, head_dim=12)),
    Case("llama-mha-eps", "Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-3)),
    Case("llama-linear", "Llama", rope("linear", factor=3.0)),
    Case("llama-3", "Llama", LLAMA3),
    Case("llama-yarn", "Llama", YARN),
    Case("llama-yarn-raw", "Llama", YARN_RAW),
    Case("llama-dynamic", "Llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 8}),
    Case("mistral-window", "Mistral", dict(sliding_window=5)),
    Case("mistral-full", "Mistral", dict(sliding_window=None, head_dim=16)),
    Case("qwen2", "Qwen2"),
    Case(
        "qwen2-mixed-windows",
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    Case("qwen3", "Qwen3", dict(head_dim=16)),
    Case("qwen3-tied-bias", "Qwen3", dict(tie_word_embeddings=True, attention_bias=True)),
    Case("mixtral", "Mixtral", dict(num_local_experts=5, num_experts_per_tok=2)),
    Case("mixtral-window", "Mixtral", dict(num_local_experts=4, sliding_window=5)),
    Case("qwen2moe", "Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    Case(
        "qwen2moe-some-dense",
        "Qwen2Moe",
        {**EXPERTS, "mlp_only_layers": [2], "norm_topk_prob": True, "qkv_bias": False},
    ),
    Case("qwen3moe", "Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    Case("qwen3moe-steps", "Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2, "head_dim": 8}),
    Case("olmoe", "Olmoe", dict(num_experts=6, num_experts_per_tok=3)),
    Case(
        "olmoe-renormalised",
        "Olmoe",
        dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True),
    ),
]
