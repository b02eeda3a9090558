import pytest

import polyhead as ph
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

TEXT = "hello world, some more text. the quick brown fox; wörld 日本 the lazy dog. " * 6


@pytest.fixture(scope="session")
def text() -> str:
    return TEXT


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], kind="bpe", vocab_size=300)


@pytest.fixture(scope="session")
def with_bos() -> Tokenizer:
    special = {"bos": "<s>", "eos": "</s>"}
    return Tokenizer.train([TEXT], kind="bpe", vocab_size=300, special_tokens=special, add_bos=True)


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def model(request) -> TaskModel:
    sizes = {"vocab_size": 300, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 48}
    more = {"d_ff": 48, "num_kv_heads": 2} if request.param == "llama" else {}
    return ph.build(request.param, seed=0, init_std=0.3, **sizes, **more).eval()
