from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from polyhead.cli.main import main
from polyhead.models.assemble import build
from polyhead.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog. " * 40


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys) -> Callable[..., Ran]:
    """Runs a command in this process."""

    def run(*words: object) -> Ran:
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


def save_model(folder: Path, chat_template: str | None, kind: str = "llama", seed: int = 0) -> Path:
    tokenizer = Tokenizer.train(
        [TEXT],
        kind="bpe",
        vocab_size=300,
        extra_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 128, "d_ff": 32}
    model = build(kind, seed=seed, vocab_size=tokenizer.vocab_size, **sizes)
    model.generation = {"eos_token_id": tokenizer.eos_id}
    model.save(folder)
    tokenizer.save(folder, force=True)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """A tiny model that was not taught to chat."""
    return save_model(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory) -> Path:
    """A tiny model with a chat template."""
    return save_model(tmp_path_factory.mktemp("chatty"), CHATML)
