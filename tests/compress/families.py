"""A tiny model of every family that has attention, and what it is called with."""

from dataclasses import dataclass, field
from typing import Any

import torch

import polyhead as ph

WORDS = torch.tensor([[1, 5, 9, 3, 7, 2, 8], [4, 4, 2, 6, 1, 9, 3]])
SIZES = dict(d_model=32, num_layers=2, num_heads=4, vocab_size=50, d_ff=24)
IMAGE = dict(image_size=16, patch_size=4)
VISION = dict(d_model=32, num_layers=2, num_heads=4, d_ff=24, **IMAGE)


@dataclass(frozen=True)
class Case:
    """Fields of a family, and which kinds of argument it takes: words, texts, images or both."""

    family: str
    fields: dict[str, Any] = field(default_factory=dict)
    takes: str = "words"
    head: str | None = None

    def build(self) -> Any:
        torch.manual_seed(0)
        model = ph.build(self.family, head=self.head, **self.fields).eval()
        with torch.no_grad():  # as large as learned weights: what goes must be seen
            for name, weight in model.named_parameters():
                if weight.ndim > 1 and "patches" not in name:
                    weight.mul_(3)
                elif name.endswith("bias"):
                    weight.normal_(std=0.3)
        return model

    def given(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(2, 3, 16, 16, generator=generator)
        return {
            "words": {"input_ids": WORDS},
            "pairs": {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :4]},
            "images": {"pixel_values": images},
            "two towers": {"input_ids": WORDS, "pixel_values": images},
            "image-text": {
                "input_ids": torch.tensor([[1, *[49] * 16, 5], [2, *[49] * 16, 7]]),
                "pixel_values": images,
            },
        }[self.takes]


TOWER = dict(d_model=32, num_layers=2, num_heads=4, d_ff=24)
EXPERTS = dict(num_experts=4, top_k=2)
OWN = dict(**SIZES, kind="decoder")
CASES = {
    "gpt2": Case("gpt2", SIZES),
    "llama": Case("llama", {**SIZES, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}),
    "mqa": Case("llama", {**SIZES, "num_kv_heads": 1, "tie_embeddings": True}),
    "mistral": Case("mistral", {**SIZES, "num_kv_heads": 4, "window": 3}),
    "qwen2": Case("qwen2", {**SIZES, "num_kv_heads": 2}),
    "qwen3": Case("qwen3", {**SIZES, "num_kv_heads": 2, "head_dim": 16}),
    "mixtral": Case("mixtral", {**SIZES, **EXPERTS, "num_kv_heads": 4}),
    "qwen2_moe": Case(
        "qwen2_moe",
        {**SIZES, **EXPERTS, "num_kv_heads": 4, "d_expert": 12, "shared_d_ff": 20,
         "sparse_step": 2},
    ),
    "qwen3_moe": Case("qwen3_moe",
        {**SIZES, **EXPERTS, "num_kv_heads": 2, "d_expert": 12, "renormalize": True},
   ),
    "bert": Case("bert", SIZES),
    "roberta": Case("roberta", SIZES, head="classify"),
    "distilbert": Case("distilbert", SIZES),
    "albert": Case("albert", {**SIZES, "embedding_width": 16}),
    "deberta": Case("deberta", SIZES),
    "deberta-v2": Case("deberta-v2", {**SIZES, "position_buckets": 8, "shares": False}),
    "deberta-v3": Case("deberta-v2", {**SIZES, "position_buckets": 8}),
    "t5": Case("t5", {**SIZES, "head_dim": 8}, "pairs"),
    "flan": Case("t5", {**SIZES, "head_dim": 6, "feed_forward": "gated-gelu"}, "pairs"),
    "marian": Case("marian", {**SIZES, "num_decoder_heads": 8, "decoder_d_ff": 16}, "pairs"),
    "transformer": Case("transformer", SIZES, "pairs"),
    "rotary": Case("transformer", {**OWN, "position": "rotary", "num_kv_heads": 2, "gated": True}),
    "alibi": Case("transformer", {**OWN, "position": "alibi"}),
    "shaw": Case("transformer", {**OWN, "position": "shaw"}),
    "t5 bias": Case("transformer", {**SIZES, "position": "t5"}, "pairs"),
    "alibi pairs": Case("transformer", {**SIZES, "position": "alibi"}, "pairs"),
    "own experts": Case("transformer", {**OWN, **EXPERTS, "shared_d_ff": 20}),
    "vit": Case("vit", VISION, "images"),
    "deit": Case("deit", VISION, "images"),
    "dinov2": Case("dinov2", {**{k: v for k, v in VISION.items() if k != "d_ff"}}, "images"),
    "dinov2 giant": Case(
        "dinov2", {**{k: v for k, v in VISION.items() if k != "d_ff"}, "is_gated": True}, "images"
    ),
    "swin": Case(
        "swin",
        dict(depths=(1, 2), num_heads=(2, 4), d_model=16, image_size=16, patch_size=2, window=4),
        "images",
    ),
    "clip": Case(
        "clip",
        dict(
            text={**TOWER, "vocab_size": 50, "eos_token_id": 9},
            vision={**TOWER, **IMAGE},
            projection_dim=16,
        ),
        "two towers",
    ),
    "llava": Case(
        "llava",
        dict(
            text={**SIZES, "num_kv_heads": 2, "model_type": "llama"},
            vision={**TOWER, **IMAGE, "model_type": "clip_vision_model"},
            image_token_id=49,
        ),
        "image-text",
    ),
}  # fmt: skip
