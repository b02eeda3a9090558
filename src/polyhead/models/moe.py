"""Decoders with mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE as rows.

LLaMA's decoder with routed feed-forwards (Jiang et al. 2024; Muennighoff et al. 2024).
"""

from dataclasses import dataclass

from torch import nn

from polyhead.errors import ConfigError
from polyhead.models.config import Row, hf
from polyhead.models.keys import Rule, Rules
from polyhead.models.llama import ATTENTION, FEEDFORWARD, Llama
from polyhead.models.llama_config import DECODER, PLAIN, LlamaConfig
from polyhead.nn.feedforward import GatedFeedForward
from polyhead.nn.moe import MixtureOfExperts

ROWS = (
    Row(
        "mixtral",
        "Mixtral",
        **DECODER,
        absent={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        implied={**PLAIN, "renormalize": True},
    ),
    Row(
        "qwen2_moe",
        "Qwen2Moe",
        **DECODER,
        absent={
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
            "qkv_bias": True,
        },
        implied={"out_bias": False, "shared_gate": True, "qk_norm": None},
    ),
    Row(
        "qwen3_moe",
        "Qwen3Moe",
        **DECODER,
        absent={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
        },
        # Its attention reads the window in every layer.
        implied={"qk_norm": "head", "max_window_layers": 0},
        harmless=frozenset({"max_window_layers"}),
    ),
    Row(
        "olmoe",
        "Olmoe",
        **DECODER,
        absent={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 8,
            "num_experts": 64,
            "router_aux_loss_coef": 0.01,
        },
        implied={**PLAIN, "window": None, "qk_norm": "width"},
    ),
)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LlamaConfig):
    """LLaMA's options and those of its experts.

    d_expert: width of an expert, None: d_ff. shared_d_ff: of the expert that sees every token.
    A layer is dense if `dense_layers` names it or it is not every `sparse_step`-th.
    """

    qkv_bias: bool = hf("qkv_bias", "attention_bias", default=False, fresh="attention_bias")
    num_experts: int = hf("num_experts", "num_local_experts")
    top_k: int = hf("num_experts_per_tok", default=2)
    d_expert: int | None = hf("moe_intermediate_size", default=None)
    renormalize: bool = hf("norm_topk_prob", default=False)
    shared_d_ff: int | None = hf("shared_expert_intermediate_size", default=None)
    shared_gate: bool = False
    sparse_step: int = hf("decoder_sparse_step", default=1)
    dense_layers: tuple[int, ...] = hf(
        "mlp_only_layers", default=(), read=lambda value: tuple(value or ()), write=list
    )
    capacity_factor: float | None = None
    router_aux_coef: float = hf("router_aux_loss_coef", default=0.001)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; choose 1 to {self.num_experts} experts")
        if self.d_expert is None and self.model_type in ("qwen2_moe", "qwen3_moe"):
            # Their config.json must name it.
            object.__setattr__(self, "d_expert", self.d_ff)
        slides = self.use_window and self.window is not None
        if self.model_type == "qwen2_moe" and slides and self.layer_types is None:
            raise ConfigError(
                "qwen2_moe with use_sliding_window needs layer_types to say which layers slide"
            )

    @classmethod
    def rows(cls) -> tuple[Row, ...]:
        return ROWS

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer routes to experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


class MoE(Llama):
    """Token ids `[B, T]` to hidden states `[B, T, E]`, after the final norm."""

    config: MoEConfig

    def make_ffn(self, layer: int) -> nn.Module:
        config = self.config
        if not config.is_sparse(layer):
            return GatedFeedForward(config.d_model, config.d_ff, config.activation)
        return MixtureOfExperts(
            config.d_model,
            config.d_expert or config.d_ff,
            config.num_experts,
            config.top_k,
            activation=config.activation,
            renormalize=config.renormalize,
            capacity_factor=config.capacity_factor,
            shared_d_ff=config.shared_d_ff,
            shared_gate=config.shared_gate,
        )


def rules(config: MoEConfig) -> Rules:
    """The checkpoint map. Mixtral calls its parts w1 (gate), w2 (down) and w3 (up)."""
    mixtral = config.model_type == "mixtral"
    moe = "model.layers.{i}.block_sparse_moe." if mixtral else "model.layers.{i}.mlp."
    names = {"gate": "w1", "down": "w2", "up": "w3"} if mixtral else {}
    return (
        *ATTENTION,
        Rule(f"{moe}gate.weight", "layers.{i}.ffn.router.weight"),
        *(
            Rule(
                f"{moe}experts.{{e}}.{names.get(part, part + '_proj')}.weight",
                f"layers.{{i}}.ffn.experts.{part}",
                stack="e",
            )
            for part in ("gate", "up", "down")
        ),
        *(
            Rule(f"{moe}shared_expert.{part}_proj.weight", f"layers.{{i}}.ffn.shared.{part}.weight")
            for part in ("gate", "up", "down")
        ),
        Rule(f"{moe}shared_expert_gate.weight", "layers.{i}.ffn.shared_gate.weight"),
        *FEEDFORWARD,
    )
