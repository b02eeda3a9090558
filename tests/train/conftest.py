from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.text.tokenizer import Tokenizer

WORDS = "the cat sat on a mat and saw that it was flat".split()


def text(lines: int, seed: int = 0) -> str:
    """Lines that a small model can learn something from."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (lines, 6), generator=generator).tolist()
    return "".join(" ".join(WORDS[i] for i in row) + ".\n" for row in rows)


def tiny(vocab_size: int, seed: int = 0, **fields):
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}
    return ph.build("gpt2", seed=seed, vocab_size=vocab_size, **{**sizes, **fields})


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([text(50)], kind="chars")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
