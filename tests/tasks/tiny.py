"""Tiny random models with a tokenizer that belongs to them, which transformers loads as well."""

from pathlib import Path
from typing import Any

import torch

import polyhead as ph
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

TEXT = (
    "Ada Lovelace wrote the first program in London. Grace Hopper found a moth in Harvard. "
    "The Analytical Engine weaves algebraic patterns, just as the loom weaves flowers and leaves. "
    "Was it good or was it bad? wörld 日本 unbelievably 1843! "
)
SIZES: dict[str, Any] = dict(d_model=32, d_ff=40, num_layers=2, num_heads=4, max_seq_len=64)
TEXTS = [
    "Grace Hopper found a moth.",
    "Was it good?",
    "The Analytical Engine weaves algebraic patterns, just as the loom weaves flowers and leaves.",
    "Ada",
    "unbelievably wörld 1843!",
]


def wordpiece(vocab_size: int = 160) -> Tokenizer:
    return Tokenizer.train([TEXT * 4], kind="wordpiece", vocab_size=vocab_size, min_frequency=1)


def make(
    folder: Path, head: str, kind: str = "bert", seed: int = 0, **fields: Any
) -> tuple[TaskModel, Tokenizer]:
    """A model with a head and its tokenizer, saved; weights far enough from 0 to disagree."""
    tokenizer = wordpiece()
    sizes = {**SIZES, "vocab_size": tokenizer.vocab_size, "init_std": 0.4}
    model = ph.build(kind, head=head, seed=seed, **{**sizes, **fields}).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    model.save(folder)
    tokenizer.save(folder, force=True)
    return ph.load(folder), ph.tokenizer(folder)


def repeatable(model: TaskModel) -> None:
    """Weights by a formula, the same on every machine and with every version."""
    with torch.no_grad():
        for number, (name, value) in enumerate(sorted(model.named_parameters())):
            count = torch.arange(value.numel(), dtype=torch.float64)
            wave = torch.sin(count * 12.9898 + 78.233 * number) * 43758.5453
            noise = (wave - wave.floor() - 0.5).reshape(value.shape)
            is_norm = name.endswith("norm.weight")
            value.copy_(1 + 0.5 * noise if is_norm else 0.9 * noise)
