"""A compiled package answers as the model does; a compiler that is missing or fails is one line."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.export.cases import BY_NAME

from polyhead.errors import ConfigError, FileError
from polyhead.export.aoti import export_aoti, inputs_of

MODEL = BY_NAME["bert-classify"].make(num_layers=1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_a_package_answers_as_the_model(tmp_path: Path) -> None:
    found = export_aoti(MODEL, tmp_path / "bert.pt2")
    assert found.files == (tmp_path / "bert.pt2",)
    assert found.difference is not None
    assert found.difference.most <= 1e-4
    compiled = torch._inductor.aoti_load_package(str(tmp_path / "bert.pt2"))
    assert inputs_of(MODEL) == ("input_ids", "attention_mask", "token_type_ids")
    for rows, tokens in ((1, 1), (7, 5), (2, 50)):
        ids, mask = torch.randint(61, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
        mask[:, tokens // 2 + 1 :] = 0
        types = torch.randint(2, (rows, tokens))
        (answer,) = compiled(ids, mask, types)
        with torch.no_grad():
            wanted = MODEL(ids, mask, types)
        torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("compiler", "words"), [("no-such-compiler", "not there"), ("false", "failed")]
)
def test_a_compiler_that_is_missing_or_fails(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ConfigError, match=words) as found:
        export_aoti(MODEL, tmp_path / "bert.pt2")
    assert compiler in str(found.value)
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"\.pt2"):
        export_aoti(MODEL, tmp_path / "model")
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(FileError, match="already"):
        export_aoti(MODEL, tmp_path / "there.pt2")
    assert (tmp_path / "there.pt2").read_text() == "mine"
