"""Small tables, tokenizers and models that a supervised objective can learn from."""

import torch

import polyhead as ph
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig

WORDS = "cat dog bird fish sat ran flew swam on under over the a mat tree sky sea".split()
KIND = {"cat": "mammal", "dog": "mammal", "bird": "bird", "fish": "fish"}


def sentences(count: int, seed: int = 0, longest: int = 9) -> list[list[str]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, longest, (count,), generator=draw).tolist()
    return [
        [WORDS[i] for i in torch.randint(len(WORDS), (size,), generator=draw).tolist()]
        for size in sizes
    ]


def classes(count: int, seed: int = 0) -> list[dict[str, str]]:
    """The label is the first word's first letter class: learnable by looking at one token."""
    names = ["low", "middle", "high"]
    return [
        {"text": " ".join(words), "label": names[WORDS.index(words[0]) * 3 // len(WORDS)]}
        for words in sentences(count, seed)
    ]


def wordpiece(extra: str = "") -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS), extra] * 3, kind="wordpiece", vocab_size=150)


STILL = {"dropout": 0.0, "attention_dropout": 0.0}


def bert(tokenizer, head: str, seed: int = 0, **fields):
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "max_seq_len": 64}
    values = {"vocab_size": tokenizer.vocab_size, **sizes, "init_std": 0.1, **STILL, **fields}
    return ph.build("bert", head=head, seed=seed, **values)


def settings(out, **more) -> TrainConfig:
    usual = {"lr": 3e-3, "batch_size": 8, "context": 32, "warmup": 2}
    if "epochs" not in more:
        usual["steps"] = 30
    return TrainConfig.fine_tuning(out=str(out), log_every=5, **{**usual, **more})
