"""The architectures GGUF and Hugging Face share: config keys as rows read in both directions.

Keys: llama.cpp, gguf-py/gguf/constants.py. What an architecture of llama.cpp fixes in its code, and
so stores nowhere, is written out as `fixed`: a config that says otherwise is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyhead.models.gguf_names import (
    GPT2_NAMES,
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    QWEN2_MOE_NAMES,
    QWEN2_NAMES,
    QWEN3_MOE_NAMES,
    QWEN3_NAMES,
    Name,
)

DECODER_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
EXPERT_KEYS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
MOE_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
WINDOW = {"attention.sliding_window": "sliding_window"}
SHARED_WIDTH = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}

QWEN_FIXED = {"hidden_act": "silu", "use_sliding_window": False}
QWEN_MOE_FIXED = {**QWEN_FIXED, "decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True)
class Family:
    """One architecture: its keys and tensors in both worlds, and what its code fixes."""

    arch: str
    model_type: str
    architecture: str
    keys: Mapping[str, str]
    names: tuple[Name, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    are_queries_whole: bool = False
    """Whether llama.cpp wants all heads of queries together as wide as the model."""


FAMILIES = (
    Family("llama", "llama", "LlamaForCausalLM", DECODER_KEYS, LLAMA_NAMES, {"hidden_act": "silu"}),
    Family(
        "llama",
        "mistral",
        "MistralForCausalLM",
        DECODER_KEYS | WINDOW,
        LLAMA_NAMES,
        {"hidden_act": "silu"},
        frozenset(WINDOW),
    ),
    Family(
        "llama",
        "mixtral",
        "MixtralForCausalLM",
        DECODER_KEYS
        | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
        | WINDOW,
        MIXTRAL_NAMES,
        {"hidden_act": "silu"},
        frozenset(WINDOW),
    ),
    Family(
        "qwen2",
        "qwen2",
        "Qwen2ForCausalLM",
        DECODER_KEYS,
        QWEN2_NAMES,
        QWEN_FIXED,
        are_queries_whole=True,
    ),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM", DECODER_KEYS, QWEN3_NAMES, QWEN_FIXED),
    Family(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        DECODER_KEYS | EXPERT_KEYS | MOE_WIDTH | SHARED_WIDTH,
        QWEN2_MOE_NAMES,
        QWEN_MOE_FIXED | {"norm_topk_prob": False},
        are_queries_whole=True,
    ),
    Family(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        DECODER_KEYS | EXPERT_KEYS | MOE_WIDTH,
        QWEN3_MOE_NAMES,
        QWEN_MOE_FIXED | {"norm_topk_prob": True},
    ),
    Family(
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        DECODER_KEYS | EXPERT_KEYS | {"attention.clamp_kqv": "clip_qkv"},
        QWEN3_MOE_NAMES,
        {"hidden_act": "silu", "norm_topk_prob": False},
        frozenset({"attention.clamp_kqv"}),
        are_queries_whole=True,
    ),
    Family(
        "gpt2",
        "gpt2",
        "GPT2LMHeadModel",
        GPT2_KEYS,
        GPT2_NAMES,
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        frozenset({"feed_forward_length"}),
        are_queries_whole=True,
    ),
)
