"""GGUF files that we write answer in llama.cpp as they do here, and their tokenizers cut alike.

Needs a Python with llama_cpp: this one, or the one that POLYHEAD_LLAMA_CPP names.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import TEXT
from torch import Tensor

import polyhead as ph
from polyhead.cli.main import main

PYTHON = os.environ.get("POLYHEAD_LLAMA_CPP", sys.executable)
SCRIPT = Path(__file__).with_name("llama_cpp_run.py")
TEXTS = ("the quick brown fox", "Zwölf  Boxkämpfer\n\njagen 123,456 — 日本", "a\tb <|im_end|> c")
WIDE: dict[str, Any] = dict(d_model=64, d_ff=96, num_layers=2, num_heads=4, max_seq_len=64)
GROUPED = dict(WIDE, num_kv_heads=2)
EXPERTS: dict[str, Any] = dict(GROUPED, num_experts=4, top_k=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": dict(GROUPED, window=None),
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "mixtral": EXPERTS,
    "qwen2_moe": dict(EXPERTS, renormalize=False, d_expert=32, shared_d_ff=64),
    "qwen3_moe": dict(EXPERTS, renormalize=True, d_expert=32),
    # llama.cpp's olmoe norms keys as wide as the model: as many heads of keys as of queries.
    "olmoe": dict(EXPERTS, renormalize=False, num_kv_heads=4),
    "gpt2": {key: value for key, value in WIDE.items() if key != "d_ff"},
}


@cache
def has_llama_cpp() -> bool:
    command = [PYTHON, "-c", "import llama_cpp"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(autouse=True)
def needs_llama_cpp() -> None:
    if not has_llama_cpp():
        pytest.skip("no llama_cpp here; name a Python that has it in POLYHEAD_LLAMA_CPP")


def asked(paths: Sequence[Path], ids: list[int], texts: Sequence[str] = TEXTS) -> list[Any]:
    """What llama.cpp says of each file."""
    jobs = [{"path": str(path), "ids": ids, "texts": list(texts)} for path in paths]
    done = subprocess.run(
        [PYTHON, str(SCRIPT)], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def made(family: str, folder: Path) -> Path:
    """A directory with a tiny model and its tokenizer."""
    tokenizer = ph.Tokenizer.train([TEXT], kind="bpe", vocab_size=300, extra_tokens=["<|im_end|>"])
    model = ph.build(family, seed=0, vocab_size=tokenizer.vocab_size, **FAMILIES[family])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Ones and zeros would hide a norm or a bias that is not read.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save(folder)
    tokenizer.save(folder)
    return folder


def off(found: Any, path: Path, ids: list[int]) -> float:
    """The largest difference to what we read from the file, as a share of the largest logit."""
    with torch.no_grad():
        wanted: Tensor = ph.load(path, dtype="float32")(torch.tensor([ids]))[0]
    logits = torch.tensor(found["logits"])
    return float((logits - wanted).abs().max() / wanted.abs().max())


IDS = [5, 120, 33, 7, 250, 91, 14, 66, 201, 8, 77, 30]


def test_every_family_answers_alike_in_float32(tmp_path: Path) -> None:
    folders = {family: made(family, tmp_path / family) for family in FAMILIES}
    files = {family: tmp_path / f"{family}.gguf" for family in FAMILIES}
    for family, file in files.items():
        assert main(["convert", str(folders[family]), str(file), "--to", "gguf"]) == 0
    for (family, file), found in zip(files.items(), asked(list(files.values()), IDS), strict=True):
        # Its GELU is a table in fp16.
        assert off(found, file, IDS) <= (1e-3 if family == "gpt2" else 1e-4), family
        ours = ph.tokenizer(folders[family])
        assert found["tokens"] == [ours.encode(text, add_special_tokens=False) for text in TEXTS], (
            family
        )


# llama.cpp rounds what it multiplies to fp16, bf16 or eight bits, as the weights are.
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_type_answers_nearly_alike(family: str, tmp_path: Path) -> None:
    folder = made(family, tmp_path / family)
    bounds = {"float16": 5e-3, "bfloat16": 3e-2, "q8_0": 3e-2, "q4_0": 4e-2, "q4_1": 4e-2}
    files = {kind: tmp_path / f"{kind}.gguf" for kind in bounds}
    for kind, file in files.items():
        words = ["convert", str(folder), str(file), "--to", "gguf", "--dtype", kind]
        assert main(words) == 0
    for (kind, file), found in zip(files.items(), asked(list(files.values()), IDS), strict=True):
        assert off(found, file, IDS) <= bounds[kind], kind


@pytest.mark.weights
def test_real_weights_in_eight_bits(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "smol.gguf"
    words = ["convert", str(smollm2), str(file), "--to", "gguf", "--dtype", "q8_0"]
    assert main(words) == 0
    ours = ph.tokenizer(smollm2)
    ids = ours.encode(
        "The capital of France is Paris, and that of Spain is", add_special_tokens=False
    )
    (found,) = asked([file], ids)
    assert off(found, file, ids) <= 5e-2
    assert found["tokens"] == [ours.encode(text, add_special_tokens=False) for text in TEXTS]
