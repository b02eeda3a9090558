"""A tiny untaught model of every family that leaves for other runtimes."""

from dataclasses import dataclass, field
from typing import Any

import torch

import polyhead as ph
from polyhead.models.model import TaskModel

TEXT = dict(vocab_size=61, d_model=32, num_layers=2, num_heads=4)
WIDE = dict(TEXT, d_ff=48)
IMAGE = dict(image_size=16, patch_size=4, d_model=32, num_layers=1, num_heads=4)
GROUPED = dict(WIDE, num_kv_heads=2)
TOWERS: dict[str, Any] = dict(
    text=dict(WIDE, max_seq_len=32), vision=dict(IMAGE, d_ff=48), projection_dim=16
)
LLAVA: dict[str, Any] = dict(
    text=dict(GROUPED, model_type="llama", max_seq_len=64),
    vision={**IMAGE, "model_type": "clip_vision_model", "d_ff": 48, "num_layers": 2},
    image_token_id=60,
    image_seq_len=16,
)


@dataclass(frozen=True)
class Case:
    family: str
    fields: dict[str, Any]
    head: str | None = None
    name: str = field(default="")

    def __str__(self) -> str:
        return self.name or "-".join([self.family, *([self.head] if self.head else [])])

    def make(self, **changes: Any) -> TaskModel:
        model = ph.build(self.family, seed=0, head=self.head, **{**self.fields, **changes}).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Ones and zeros would hide a norm or a bias that is not read.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


def stack(name: str, **fields: Any) -> Case:
    return Case("transformer", dict(WIDE, kind="decoder", **fields), name=f"decoder-{name}")


ENCODERS = [
    *(Case("bert", dict(WIDE, max_seq_len=64), head) for head in (None, "classify", "answer")),
    *(Case("bert", dict(WIDE, max_seq_len=64), head) for head in ("none", "embed", "pretraining")),
    Case("roberta", dict(WIDE, max_seq_len=64)),
    Case("distilbert", dict(WIDE, max_seq_len=64), "tag"),
    Case("albert", dict(WIDE, max_seq_len=64, embedding_width=16)),
    Case("deberta", dict(WIDE, max_seq_len=64)),
    Case("deberta-v2", dict(WIDE, max_seq_len=64, position_buckets=8, reach=20)),
    Case("transformer", dict(WIDE, kind="encoder", num_experts=3), "classify"),
]
DECODERS = [
    Case("gpt2", dict(TEXT, max_seq_len=64)),
    Case("llama", GROUPED),
    Case("mistral", dict(GROUPED, window=4)),
    Case("qwen2", GROUPED),
    Case("qwen3", GROUPED),
    Case("mixtral", dict(GROUPED, num_experts=4, top_k=2)),
    Case("qwen2_moe", dict(GROUPED, num_experts=4, top_k=2, shared_d_ff=40)),
    Case("qwen3_moe", dict(GROUPED, num_experts=4, top_k=2)),
    *(stack(kind, position=kind) for kind in ("alibi", "t5", "shaw", "rotary", "learned")),
    stack("strided", pattern="strided", stride=3),
    stack("big-bird", pattern="big_bird", window=3, position="rotary"),
]
OTHERS = [
    Case("gpt2", dict(TEXT, max_seq_len=64), "classify"),
    Case("bigram", dict(vocab_size=61, d_model=32)),
    Case("window_mlp", dict(vocab_size=61, d_model=32)),
    Case("t5", dict(WIDE, head_dim=8)),
    Case("marian", WIDE),
    Case("transformer", WIDE),
    Case("vit", dict(IMAGE, d_ff=48)),
    Case("dinov2", IMAGE),
    Case(
        "swin",
        dict(
            d_model=16, depths=(1, 2), num_heads=(2, 2), image_size=24, patch_size=4, window=3
        ),
    ),
    Case("clip", TOWERS),
    Case("llava", LLAVA),
    Case("clip_text_model", dict(WIDE, max_seq_len=32)),
    Case("clip_vision_model", dict(IMAGE, d_ff=48)),
]  # fmt: skip
CASES = [*ENCODERS, *DECODERS, *OTHERS]
BY_NAME = {str(case): case for case in CASES}
