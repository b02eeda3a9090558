"""GGUF holds the very codes of a model in few bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.test_gptq import batches
from tests.compress.test_saved import answer, made

import polyhead as ph
from polyhead.compress.export import write_gguf
from polyhead.compress.saved import PackedModel
from polyhead.errors import ConfigError
from polyhead.files.gguf import open_gguf

SIZES: dict[str, Any] = dict(vocab_size=70, d_model=64, num_layers=2, num_heads=4)
DECODERS: dict[str, dict[str, Any]] = {
    "llama": dict(SIZES, d_ff=96, num_kv_heads=2, tie_embeddings=True),
    "qwen2": dict(SIZES, d_ff=96, num_kv_heads=2),
    "gpt2": SIZES,
    "mixtral": dict(SIZES, d_ff=96, num_experts=4, top_k=2),
}
KINDS = {"int4": "Q4_1", "int8": "Q8_0", "fp16": "F16", "bf16": "BF16"}


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_the_file_holds_the_same_numbers(name: str, form: str, tmp_path: Path) -> None:
    model = ph.quantize(ph.build(name, seed=0, **DECODERS[name]).eval(), form)
    assert isinstance(model, PackedModel)
    path = tmp_path / "model.gguf"
    write_gguf(path, model, model.hf_config())
    found = ph.load(path)
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value), key
    assert torch.allclose(answer(found), answer(model), atol=1e-5)
    file = open_gguf(path)
    assert file.type_of("blk.0.attn_output.weight") == KINDS[form]
    assert file.type_of("token_embd.weight") == KINDS["int8" if form == "int4" else form]


def test_wider_groups_and_gptq(tmp_path: Path) -> None:
    fields = dict(DECODERS["llama"], d_ff=128)
    plain = ph.build("llama", seed=0, **fields).eval()
    model = ph.quantize(plain, "int4", group=64, method="gptq", calibration=batches(plain))
    assert isinstance(model, PackedModel)
    write_gguf(tmp_path / "m.gguf", model, model.hf_config())
    assert torch.allclose(answer(ph.load(tmp_path / "m.gguf")), answer(model), atol=1e-5)
    kept = ph.load(tmp_path / "m.gguf", packed=True)
    assert torch.allclose(answer(kept), answer(model), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("llama", "nf4", "GGUF has no kind for nf6: choose int4"),
        ("llama", "int8-rows", "no kind for int8-rows"),
        ("bert", "int4", "bert"),
        ("odd", "int4", "is 36 wide, which GGUF's blocks of 32 do not divide"),
    ],
)
def test_what_gguf_does_not_know(name: str, form: str, said: str, tmp_path: Path) -> None:
    model = ph.quantize(made(name), form)
    assert isinstance(model, PackedModel)
    with pytest.raises(ConfigError, match=said) as caught:
        write_gguf(tmp_path / "m.gguf", model, model.hf_config())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()
