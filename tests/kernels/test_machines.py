"""Kernels compiled for machines with fewer instructions do what those for this one do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_decode import FORMS, MODELS, differences, shaken, worst, write
from tests.kernels.test_training import distance, learned, made

import polyhead as ph
from polyhead.compress.formats import Int4, Int8, Int8Rows
from polyhead.compress.steps import rounded_inputs
from polyhead.kernels.native import library
from polyhead.kernels.products import LaidOut
from polyhead.kernels.training import fused

pytestmark = pytest.mark.skipif(library("step") is None, reason="nothing compiles it here")
__all__ = ["differences"]

AVX2 = "-march=haswell"
WANTED = {"-mtune=generic": "", AVX2: "avx2", f"{AVX2} -mavxvnni": "avx_vnni"}


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if WANTED[request.param] not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"this machine has no {WANTED[request.param]}")
    monkeypatch.setenv("POLYHEAD_MACHINE", request.param)
    return request.param


machines = pytest.mark.parametrize("machine", WANTED, indirect=True)
few = pytest.mark.parametrize("machine", ["-mtune=generic", AVX2], indirect=True)


@machines
@pytest.mark.parametrize("form", [Int4, Int8, Int8Rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products(form: Any, dtype: torch.dtype, machine: str) -> None:
    assert library("products") is not library("products", "-march=native")
    for rows, width, tokens in ((1, 1, 1), (33, 70, 9), (100, 96, 3), (192, 576, 17)):
        torch.manual_seed(rows)
        weight = torch.randn(rows, width)
        weight[: rows // 2] = weight[: rows // 2].sign()  # sums as large as can be
        packed, x = form(weight), torch.randn(tokens, width)
        x[::2] = x[::2].sign()
        x = x.to(dtype)
        laid_out = LaidOut.of(packed)
        assert laid_out is not None
        found = laid_out.times(x)
        assert found is not None
        true = rounded_inputs(x, form).double() @ packed.unpack().double().T
        size = rounded_inputs(x, form).double().abs() @ packed.unpack().double().abs().T
        step = 1e-6 if dtype == torch.float32 else 2**-8
        assert ((found - true).abs() <= step * size.clamp(min=1e-9) + 1e-12).all()
        second = LaidOut.of(form(torch.randn(5, rows)))
        assert second is not None
        both = laid_out.then_times(x.float(), second, (None, None), None)
        assert torch.equal(both, second.times(laid_out.times(x.float())))
        alone = laid_out.times(x[:1])
        assert alone is not None
        assert torch.equal(alone[0], found[0])


@few
@pytest.mark.parametrize(
    ("name", "form", "dtype", "kv"),
    [
        ("llama", "int4", torch.float32, "model"),
        ("llama-odd", "int8", torch.float32, "int8"),
        ("mixtral", "int8-rows", torch.float32, "model"),
        ("gpt2-odd", "plain", torch.float32, "model"),
        ("alibi", "plain", torch.float32, "fp16"),
        ("llama", "int8", torch.bfloat16, "int8"),
        ("gpt2", "plain", torch.bfloat16, "model"),
    ],
)
def test_a_recorded_step(
    name: str, form: str, dtype: torch.dtype, kv: Any, machine: str, differences: list[float]
) -> None:
    family, sizes = MODELS[name]
    model = FORMS[form](shaken(ph.build(family, seed=0, **sizes)).eval().to(dtype))
    write(model, kv=kv)
    assert len(differences) > 10
    # What is kept as halves may fall on either side of a tie.
    exact = dtype == torch.float32 and form == "plain"
    limit = (1e-5 if kv == "model" else 1e-3) if exact else 4e-2
    assert worst(differences, name, rounded=not exact) < limit
    assert sorted(differences)[len(differences) // 2] < (1e-3 if dtype == torch.float32 else 4e-2)


@few
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training(name: str, machine: str) -> None:
    model = made(name, torch.float32)
    usual = learned(model)
    with fused(model):
        assert distance(learned(model), usual) < 2e-5
