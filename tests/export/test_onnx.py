"""ONNX files answer in onnxruntime as the model does, at sizes that they were not traced at.

A graph takes seconds to trace, so a few families stand for all, whose graphs test_graphs.py runs;
POLYHEAD_LONG=1 writes every one of them.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.export.cases import BY_NAME, CASES, Case
from torch import Tensor

from polyhead.errors import ConfigError, FileError
from polyhead.export import onnx
from polyhead.export.check import Difference, largest_difference
from polyhead.export.graphs import graphs
from polyhead.export.onnx import export_onnx, runner
from polyhead.export.parts import exportable
from polyhead.models.model import TaskModel

pytest.importorskip("onnxscript", reason="ONNX needs polyhead[onnx]")
pytest.importorskip("onnxruntime", reason="ONNX needs polyhead[onnx]")

TOLERANCE = 1e-4
SIZES = ((1, 1), (2, 2), (3, 17), (6, 40))
SMALL = dict(num_layers=1)
TABLE: dict[str, dict[str, int]] = {
    "deberta-v2": SMALL,
    "mistral": SMALL,
    "mixtral": dict(SMALL, num_experts=3),
    "t5": SMALL,
}
if os.environ.get("POLYHEAD_LONG"):
    TABLE = {**{str(case): {} for case in CASES}, **TABLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def made(name: str) -> TaskModel:
    return BY_NAME[name].make(**TABLE[name])


def exported(name: str, folder: Path) -> tuple[TaskModel, dict[str, Path]]:
    """The model and its files, written once for all tests."""
    model, place = made(name), folder / name
    if not place.exists():
        found = export_onnx(model, place)
        assert found.difference is not None
        assert found.difference.most <= TOLERANCE
    return model, {path.stem: path for path in place.glob("*.onnx")}


@pytest.mark.parametrize("name", TABLE)
def test_onnxruntime_answers_as_the_model(name: str, folder: Path) -> None:
    model, files = exported(name, folder)
    found = graphs(exportable(model), True)
    assert files.keys() == {graph.name for graph in found}
    for seed in (1, 2):
        worst = largest_difference(model, found, runner(files), SIZES, seed)
        assert worst.most <= TOLERANCE


def test_axes_have_names_and_nothing_says_where_it_was_made(folder: Path) -> None:
    import onnxruntime

    _, files = exported("mistral", folder)
    session = onnxruntime.InferenceSession(files["model"])
    shapes = {put.name: put.shape for put in session.get_inputs()}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]
    raw = files["model"].read_bytes()
    assert b"site-packages" not in raw
    assert b"polyhead/" not in raw


def test_a_runtime_writes_token_by_token_what_the_model_writes(folder: Path) -> None:
    model, files = exported("mistral", folder)
    run = runner(files)
    ids = torch.randint(61, (2, 5))
    width = {"past_key_values.0.key": (2, 2, 0, 8), "past_key_values.0.value": (2, 2, 0, 8)}
    past = {name: torch.zeros(shape) for name, shape in width.items()}
    new, told, mask = ids, ids, torch.ones_like(ids)
    for _ in range(8):
        answer = run("model", {"input_ids": new, "attention_mask": mask, **past})
        new = answer["logits"][:, -1:].argmax(-1)
        told = torch.cat([told, new], 1)
        mask = torch.ones_like(told)
        past = {
            f"past_key_values.0.{kind}": answer[f"present.0.{kind}"] for kind in ("key", "value")
        }
    wanted = ids
    with torch.no_grad():
        for _ in range(8):
            wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], 1)
    assert told.tolist() == wanted.tolist()


# Traced in no time.
QUICK = Case("window_mlp", dict(vocab_size=61, d_model=128, embedding_width=16, window=3))


def test_eight_bits_are_smaller_and_near(tmp_path: Path) -> None:
    model = QUICK.make()
    found = export_onnx(model, tmp_path, quantize="int8")
    (file,) = found.files
    assert file.name == "model_quantized.onnx"
    assert file.stat().st_size < 0.5 * 4 * model.num_parameters()
    assert found.difference is not None
    assert 0 < found.difference.share < 0.2
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "window_mlp"
    with pytest.raises(FileError, match="already"):
        export_onnx(model, tmp_path, quantize="int8")


def test_what_onnxruntime_refuses_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(paths: dict[str, Path]) -> None:
        raise ConfigError("onnxruntime does not take the file")

    monkeypatch.setattr(onnx, "runner", broken)
    with pytest.raises(ConfigError, match="take"):
        export_onnx(QUICK.make(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "_has", lambda module: module != "onnxscript")
    with pytest.raises(ConfigError, match=r"pip install 'polyhead\[onnx\]'"):
        export_onnx(QUICK.make(), tmp_path)
    with pytest.raises(ConfigError, match="int4"):
        export_onnx(QUICK.make(), tmp_path, quantize="int4")


def test_a_difference_that_is_not_a_number_is_the_worst() -> None:
    model = QUICK.make()
    found = graphs(exportable(model), True)

    def run(name: str, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": torch.full((*feeds["input_ids"].shape, 61), float("nan"))}

    worst = largest_difference(model, found, run, ((1, 1), (2, 2)))
    assert not worst.most <= 1e9
    assert not worst.share <= 1e9


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    QUICK.make().save(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_verb(cli, tiny: Path, tmp_path: Path) -> None:
    found = cli("export", tiny, "--to", "onnx", "--out", tmp_path / "out", "--json")
    assert found.code == 0
    said = json.loads(found.out)
    assert said["files"] == [str(tmp_path / "out" / "model.onnx")]
    assert said["max_difference"] < TOLERANCE
    again = cli("export", tiny, "--to", "onnx", "--out", tmp_path / "out")
    assert again.code == 2
    assert "already" in again.err


def test_the_verb_fails_where_answers_differ(
    cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = onnx.Exported((tiny / "config.json",), Difference(0.5, float("nan")))
    monkeypatch.setattr(onnx, "export_onnx", lambda *args, **named: found)
    (tmp_path / "out").mkdir()
    said = cli("export", tiny, "--to", "onnx", "--out", tmp_path / "out")
    assert said.code == 1
    assert "do not use" in said.err
    monkeypatch.setattr(onnx, "export_onnx", lambda *args, **named: replace(found, difference=None))
    said = cli("export", tiny, "--to", "onnx", "--out", tmp_path / "out")
    assert said.code == 0
    assert "not checked" in said.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--to", "onnx", "--dtype", "bfloat16"), "float32"),
        (("--to", "aoti", "--quantize", "int8"), "--to onnx"),
        (("--to", "aoti", "--no-past"), "--to onnx"),
        (("--to", "aoti"), ".pt2"),
        (("--to", "coreml"), "coreml"),
    ],
)
def test_flags_that_do_not_go_together(
    cli, tiny: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    found = cli("export", tiny, "--out", tmp_path / "out", *flags)
    assert found.code == 2
    assert words in found.err
    assert found.err.count("\n") == 1
