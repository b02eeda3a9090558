"""Whoever loads what was saved can tell that it answers as it did, and what of it does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.test_images import clip, vision
from tests.tasks.test_translate import make as make_pair
from tests.tasks.tiny import make

import polyhead as ph
from polyhead.compress.quantize import quantize
from polyhead.models.probes import FILE, check_probes, write_probes

MADE: dict[str, Callable[[Path], Any]] = {
    "decoder": lambda folder: make(folder, "lm", kind="gpt2"),
    "experts": lambda folder: make(folder, "lm", kind="mixtral", num_experts=4, top_k=2),
    "encoder": lambda folder: make(folder, "lm"),
    "classifier": lambda folder: make(folder, "classify", labels=("a", "b")),
    "vectors": lambda folder: make(folder, "none"),
    "questions": lambda folder: make(folder, "answer"),
    "t5": lambda folder: make_pair(folder, "t5"),
    "pair": lambda folder: make_pair(folder, "transformer"),
    "lstm": lambda folder: make(folder, "lm", kind="lstm", num_heads=None),
    "vit": lambda folder: (vision(folder)[0], None),
    "clip": lambda folder: clip(folder)[:2],
}


def saved(kind: str, folder: Path, **change: Any) -> Any:
    model, words = MADE[kind](folder)
    for name, value in change.items():
        model = getattr(model, name)(value)
    if change:
        model.save(folder, force=True)
    write_probes(model, words, folder)
    return ph.load(folder), words


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "lstm"])
def test_what_was_saved_holds(kind: str, tmp_path: Path) -> None:
    model, words = saved(kind, tmp_path)
    assert check_probes(tmp_path, model, words) == []
    said = json.loads((tmp_path / FILE).read_text())
    assert len(said["probes"]) == (1 if words is None else 10)
    assert {"config.json", "model.safetensors"} <= said["files"].keys()
    assert check_probes(tmp_path, ph.pack(model), words) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_other_dtypes_and_in_few_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model, words = saved("decoder", tmp_path / "a", to=dtype)
    assert check_probes(tmp_path / "a", model, words) == []
    for method in ("int8", "int4"):
        folder = tmp_path / method
        small = quantize(model, method)
        small.save(folder)
        words.save(folder)
        write_probes(small, words, folder)
        assert check_probes(folder, ph.load(folder), words) == []


def altered_weights(folder: Path) -> None:
    model = ph.load(folder)
    with torch.no_grad():
        model.backbone.layers[1].ffn.down.weight.mul_(1.2)
    model.save(folder, force=True)


def edited(name: str, before: str, after: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))

    return edit


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (altered_weights, ["model.safetensors was altered", "has logits that are"]),
        (
            edited("tokenizer.json", '"Ada": 155', '"Adu": 155'),
            ["tokenizer.json was altered", "has other ids"],
        ),
        (lambda folder: (folder / "tokenizer_config.json").unlink(),
         ["tokenizer_config.json is missing"]),
        (edited("config.json", '"architectures"', '"architectures" '), ["config.json was altered"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}?"),
         ["has other ids"]),
    ],
    ids=["weights", "tokenizer", "missing", "config", "template"],
)  # fmt: skip
def test_what_was_changed_is_told(
    change: Callable[[Path], object], told: list[str], tmp_path: Path
) -> None:
    saved("decoder", tmp_path)
    change(tmp_path)
    wrong = check_probes(tmp_path, ph.load(tmp_path), ph.tokenizer(tmp_path))
    for words in told:
        assert any(words in line for line in wrong), wrong
    ids_alone = check_probes(tmp_path, ph.load(tmp_path), ph.tokenizer(tmp_path), logits=False)
    assert not any("logits" in line for line in ids_alone)


def test_what_is_no_file_of_probes(tmp_path: Path) -> None:
    model, words = MADE["decoder"](tmp_path)
    assert check_probes(tmp_path, model, words) == []
    (tmp_path / FILE).write_text('{"format": 9}')
    with pytest.raises(ph.FileError, match="no file of probes"):
        check_probes(tmp_path, model, words)
