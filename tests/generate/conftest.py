from collections.abc import Callable

import pytest
import torch
from torch import nn

from polyhead.generate.generator import TextGenerator
from polyhead.nn.cache import Caches, GrowingCache, StaticCache
from polyhead.text.tokenizer import Tokenizer


class _ScriptBackbone(nn.Module):
    """After position p comes token script[p + 1], whatever was said. Counts what it is fed."""

    def __init__(self, script: list[int], vocab: int) -> None:
        super().__init__()
        self.register_buffer("script", torch.tensor(script))
        self.vocab = vocab
        self.fed = 0

    def make_caches(self, batch_size: int, max_len: int | None = None) -> Caches:
        like = torch.zeros(1)
        if max_len is None:
            return Caches([GrowingCache(batch_size, 1, 1, like)])
        return Caches([StaticCache(batch_size, 1, 1, max_len, like)])

    def forward(self, input_ids, attention_mask=None, caches=None):
        self.fed += input_ids.numel()
        at = caches.begin(input_ids.shape[1], attention_mask)
        caches.end()
        return nn.functional.one_hot(self.script[(at + 1) % len(self.script)], self.vocab).float()


class Scripted(nn.Module):
    """A model that writes a script: position p of any row is token p of it."""

    def __init__(self, script: list[int], vocab: int, max_seq_len: int = 512) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": vocab, "max_seq_len": max_seq_len})()
        self.backbone = _ScriptBackbone(script, vocab)
        self.head = nn.Linear(vocab, vocab, bias=False)
        self.head.weight = nn.Parameter(torch.eye(vocab) * 20)
        self.head_kind = "lm"
        self.device, self.dtype = torch.device("cpu"), torch.float32


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [
        "the quick brown fox jumps over the lazy dog. " * 9,
        "hello world, some more text. " * 9,
    ]
    special = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    return Tokenizer.train(texts, kind="bpe", vocab_size=300, special_tokens=special)


@pytest.fixture(scope="session")
def scripted(tokenizer) -> Callable[..., TextGenerator]:
    """scripted("text", 3): a generator whose model writes `text`, from 3 tokens of it as prompt."""

    def make(text: str | list[int], max_seq_len: int = 512) -> TextGenerator:
        ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        return TextGenerator(Scripted(ids, tokenizer.vocab_size, max_seq_len), tokenizer)

    return make
