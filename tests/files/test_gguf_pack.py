"""Blocks are those of gguf's own reference, bit for bit."""

import numpy as np
import pytest
import torch

from polyhead.errors import ConfigError
from polyhead.files.gguf_pack import PACKERS, pack
from polyhead.models.gguf_packed import Packed

quants = pytest.importorskip("gguf.quants")


@pytest.mark.parametrize("kind", PACKERS)
def test_blocks_equal_the_reference(kind: str) -> None:
    from gguf import GGMLQuantizationType

    torch.manual_seed(0)
    rows = [torch.randn(7, 96), torch.randn(2, 96) * 1e-4, torch.zeros(1, 96), torch.ones(1, 96)]
    halves = torch.arange(-48, 48)[None] / 2.0  # what rounds between two
    tensor = torch.cat([*rows, -torch.ones(1, 96), halves])
    wanted = quants.quantize(tensor.numpy(), GGMLQuantizationType[kind])
    found = pack(tensor, kind)
    assert found.shape == (13, 96)
    assert np.array_equal(found.data.numpy().reshape(wanted.shape), wanted)
    step = {"Q8_0": 1 / 127, "Q4_0": 1 / 7, "Q4_1": 1 / 15}[kind] * tensor.abs().max()
    assert (found.values() - tensor).abs().max() <= 2.1 * step


def test_what_no_blocks_hold_stays_in_floats() -> None:
    tensors = {
        "blk.0.attn_q.weight": torch.randn(4, 64),
        "blk.0.attn_q.bias": torch.randn(64),
        "blk.0.ffn_gate_inp.weight": torch.randn(4, 64),
        "blk.0.ffn_down.weight": torch.randn(4, 48),
        "token_embd.weight": torch.randn(4, 64),
    }
    packed = Packed(tensors, "Q4_0")
    kinds = {name: getattr(packed[name], "kind", None) for name in packed}
    assert list(kinds.values()) == ["Q4_0", None, None, None, "Q8_0"]
    assert packed["blk.0.ffn_down.weight"].dtype == torch.float16
    assert packed["blk.0.ffn_gate_inp.weight"].dtype == torch.float32
    with pytest.raises(ConfigError, match="Q2_K"):
        Packed(tensors, "Q2_K")
