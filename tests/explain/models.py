"""Small models of every family with an answer, and something to call each with."""

from collections.abc import Mapping
from typing import Any

import torch
from tests.nn.parts import shaken
from torch import Tensor

import polyhead as ph

IDS = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
SIZES = dict(vocab_size=31, d_model=16, d_ff=24, num_layers=3, num_heads=4)
TEXT = {**SIZES, "max_seq_len": 32}
EXPERTS = dict(num_experts=4, top_k=2, num_kv_heads=2)
VISION = dict(d_model=16, num_heads=4, image_size=16, patch_size=4, labels=tuple("abcde"))
CLASSES = dict(head="classify", labels=tuple("abcde"))
WINDOWS = dict(num_heads=(2, 4), depths=(2, 2), window=2, patch_size=2)

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**TEXT, "num_kv_heads": 2}),
    "llama-biases": ("llama", {**TEXT, "qkv_bias": True, "out_bias": True, "ffn_bias": True}),
    "gpt2": ("gpt2", TEXT),
    "gpt2-untied": ("gpt2", {**TEXT, "tie_embeddings": False}),
    "mixtral": ("mixtral", {**TEXT, **EXPERTS}),
    "bert": ("bert", TEXT),
    "bert-classify": ("bert", {**TEXT, **CLASSES}),
    "albert": ("albert", {**TEXT, "embedding_width": 8}),
    "deberta": (
        "deberta-v2",
        {**TEXT, "head": "classify", "position_buckets": 8, "labels": tuple("abcde")},
    ),
    "t5": ("t5", {**SIZES, "head_dim": 4}),
    "transformer": ("transformer", {**TEXT, "kind": "encoder-decoder"}),
    "vit": ("vit", {**VISION, "num_layers": 2, "d_ff": 24}),
    "swin": (
        "swin",
        {**VISION, "num_heads": (2, 4), "depths": (2, 2), "window": 2, "patch_size": 2},
    ),
}


def made(name: str) -> Any:
    family, options = FAMILIES[name]
    return shaken(ph.build(family, seed=0, **options), 0.2, 0).eval()


def inputs_of(name: str) -> Any:
    if name in ("vit", "swin"):
        return IMAGES
    if name in ("t5", "transformer"):
        return {"input_ids": IDS, "decoder_input_ids": OTHER}
    return IDS


def answer(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
