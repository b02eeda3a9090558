"""How a verb opens a GGUF file: as the blocks that it has, where the CPU multiplies them."""

from pathlib import Path

import pytest
import torch
from tests.compress.test_blocks import packed_parts, write_blocks

import polyhead as ph
from polyhead.compress.formats import PackedWeight
from polyhead.kernels.native import library
from polyhead.kernels.products import LaidOut
from polyhead.serve import opening
from polyhead.serve.opening import Opening


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Q4_0 and Q6_K by turns."""
    return write_blocks(tmp_path_factory.mktemp("model") / "m.gguf", "llama", ("Q4_0", "Q6_K"))


@pytest.fixture(autouse=True)
def vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


def opened(file: Path, writes: bool = True, **given: str) -> list[PackedWeight]:
    model, _ = Opening(device="cpu", **given).open_model(str(file), writes=writes)
    return packed_parts(model)


@pytest.mark.skipif(library("products") is None, reason="needs g++")
def test_writing_takes_the_blocks_that_kernels_multiply(file: Path) -> None:
    parts = opened(file)
    assert parts
    assert all(isinstance(part, LaidOut) for part in parts)
    assert len(parts) < len(packed_parts(ph.load(file, packed=True)))


@pytest.mark.parametrize(
    "given", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"writes": False}], ids=str
)
def test_floats_where_they_are_asked_for_or_measured(file: Path, given: dict) -> None:
    assert not opened(file, **given)


def test_floats_where_there_is_no_vnni(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not opened(file)


def test_other_files_are_opened_as_ever(plain: Path) -> None:
    assert not opened(plain)
    assert opening._kinds_multiplied(plain, torch.device("cpu")) == ()
