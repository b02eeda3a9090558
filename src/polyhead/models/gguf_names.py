"""Tensor names in GGUF and in Hugging Face checkpoints: rows of data read in both directions.

GGUF's names: llama.cpp, gguf-py/gguf/constants.py; what its converter does to the values besides:
convert_hf_to_gguf.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyhead.errors import ConfigError


class Change(ABC):
    """How a tensor differs between the two worlds besides its name; `on_rows`: only whole rows."""

    on_rows: ClassVar[bool] = False

    @abstractmethod
    def to_hf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """GGUF's values as Hugging Face has them."""

    @abstractmethod
    def to_gguf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Hugging Face's values as GGUF has them."""


@dataclass(frozen=True)
class Interleaved(Change):
    """Rows of each head as pairs (Meta's RoPE) in GGUF, as two halves in Hugging Face."""

    heads: str
    on_rows: ClassVar[bool] = True

    def to_hf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Rows 0 2 4 ... 1 3 5 of every head."""
        return self._reorder(tensor, (self._heads(tensor, config), -1, 2))

    def to_gguf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """Rows of the halves by turns."""
        return self._reorder(tensor, (self._heads(tensor, config), 2, -1))

    def _reorder(self, tensor: Tensor, split: tuple[int, int, int]) -> Tensor:
        rows = tensor
        if tensor.dtype == torch.uint8 and tensor.shape[-1] % 8 == 0 and tensor.data_ptr() % 8 == 0:
            rows = tensor.view(torch.int64)  # packed bytes by eight: an eighth of the steps
        moved = rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
        return moved.view(tensor.dtype)

    def _heads(self, tensor: Tensor, config: Mapping[str, Any]) -> int:
        heads = int(config.get(self.heads) or config["num_attention_heads"])
        if tensor.shape[0] % (2 * heads):
            raise ConfigError(f"{tensor.shape[0]} rows do not divide into {heads} heads of pairs")
        return heads


@dataclass(frozen=True)
class Transposed(Change):
    """[out, in] in GGUF, [in, out] in Hugging Face's Conv1D."""

    def to_hf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """[in, out]."""
        return tensor.t()

    def to_gguf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """[out, in]."""
        return tensor.t()


@dataclass(frozen=True)
class OneRow(Change):
    """A vector [E] in GGUF, a matrix [1, E] in Hugging Face."""

    def to_hf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """[1, E]."""
        return tensor.reshape(1, -1)

    def to_gguf(self, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        """[E]."""
        return tensor.reshape(-1)


@dataclass(frozen=True)
class Name:
    """A tensor in both worlds; `{i}` is the layer, `{e}` the expert, in GGUF stacked in front."""

    gguf: str
    hf: str
    change: Change | None = None
    optional: bool = False


LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."
EMBEDDING = (
    Name("token_embd.weight", "model.embed_tokens.weight"),
    Name("output_norm.weight", "model.norm.weight"),
    Name("output.weight", "lm_head.weight", optional=True),
)
BLOCK_NORMS = (
    Name(BLOCK + "attn_norm.weight", LAYER + "input_layernorm.weight"),
    Name(BLOCK + "ffn_norm.weight", LAYER + "post_attention_layernorm.weight"),
)
HEAD_NORMS = tuple(
    Name(f"{BLOCK}attn_{part}_norm.weight", f"{LAYER}self_attn.{part}_norm.weight") for part in "qk"
)


def _linear(
    gguf: str, hf: str, change: Change | None = None, bias: bool = True
) -> tuple[Name, ...]:
    weight = Name(f"{BLOCK}{gguf}.weight", f"{LAYER}{hf}.weight", change)
    biases = Name(f"{BLOCK}{gguf}.bias", f"{LAYER}{hf}.bias", change, optional=True)
    return (weight, biases) if bias else (weight,)


def _attention(query: Change | None = None, key: Change | None = None) -> tuple[Name, ...]:
    return (
        *_linear("attn_q", "self_attn.q_proj", query),
        *_linear("attn_k", "self_attn.k_proj", key),
        *_linear("attn_v", "self_attn.v_proj"),
        *_linear("attn_output", "self_attn.o_proj"),
    )


def _mlp(gguf: str = "", hf: str = "mlp.", bias: bool = True) -> tuple[Name, ...]:
    return tuple(
        name
        for part in ("gate", "up", "down")
        for name in _linear(f"ffn_{part}{gguf}", f"{hf}{part}_proj", bias=bias)
    )


def _experts(moe: str, parts: Mapping[str, str]) -> tuple[Name, ...]:
    router = Name(BLOCK + "ffn_gate_inp.weight", f"{LAYER}{moe}.gate.weight")
    return (
        router,
        *(
            Name(f"{BLOCK}ffn_{part}_exps.weight", f"{LAYER}{moe}.experts.{{e}}.{theirs}.weight")
            for part, theirs in parts.items()
        ),
    )


PERMUTED = _attention(Interleaved("num_attention_heads"), Interleaved("num_key_value_heads"))
MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
QWEN_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SHARED_EXPERT = (
    *_mlp("_shexp", "mlp.shared_expert.", bias=False),
    Name(BLOCK + "ffn_gate_inp_shexp.weight", LAYER + "mlp.shared_expert_gate.weight", OneRow()),
)

DECODER = (*EMBEDDING, *BLOCK_NORMS)
LLAMA_NAMES = (*DECODER, *PERMUTED, *_mlp())
MIXTRAL_NAMES = (*DECODER, *PERMUTED, *_experts("block_sparse_moe", MIXTRAL_PARTS))
QWEN2_NAMES = (*DECODER, *_attention(), *_mlp())
QWEN3_NAMES = (*QWEN2_NAMES, *HEAD_NORMS)
QWEN2_MOE_NAMES = (*DECODER, *_attention(), *_experts("mlp", QWEN_PARTS), *SHARED_EXPERT)
QWEN3_MOE_NAMES = (*DECODER, *_attention(), *HEAD_NORMS, *_experts("mlp", QWEN_PARTS))
GPT2_NAMES = (
    Name("token_embd.weight", "transformer.wte.weight"),
    Name("position_embd.weight", "transformer.wpe.weight"),
    *(Name(f"output_norm.{kind}", f"transformer.ln_f.{kind}") for kind in ("weight", "bias")),
    Name("output.weight", "lm_head.weight", optional=True),
    *(
        Name(f"{BLOCK}{gguf}.{kind}", f"transformer.h.{{i}}.{hf}.{kind}", change)
        for gguf, hf, turned in (
            ("attn_norm", "ln_1", False),
            ("attn_qkv", "attn.c_attn", True),
            ("attn_output", "attn.c_proj", True),
            ("ffn_norm", "ln_2", False),
            ("ffn_up", "mlp.c_fc", True),
            ("ffn_down", "mlp.c_proj", True),
        )
        for kind, change in (("weight", Transposed() if turned else None), ("bias", None))
    ),
)
