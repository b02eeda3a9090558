"""What was trained is what is served: probes are replayed at the start."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from tests.serve.conftest import Start

import polyhead as ph
from polyhead.models.probes import write_probes


@pytest.fixture
def proved(folder: Path, tmp_path: Path) -> Path:
    model, words = ph.load(folder), ph.tokenizer(folder)
    model.save(tmp_path / "proved")
    words.save(tmp_path / "proved", force=True)
    write_probes(model, words, tmp_path / "proved")
    return tmp_path / "proved"


def refused(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "polyhead.cli.main", "serve", str(folder), "--port", "0", *flags]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def test_what_was_saved_is_served(proved: Path, start: Start) -> None:
    server = start(models=[proved])
    assert httpx.get(f"{server.url}/ready").status_code == 200
    small = start("--quantize", "int4", models=[proved])
    assert httpx.get(f"{small.url}/ready").status_code == 200


def test_what_was_not_is_refused_unless_told(proved: Path, start: Start) -> None:
    model = ph.load(proved)
    with torch.no_grad():
        model.backbone.layers[0].ffn.up.weight.mul_(1.5)
    model.save(proved, force=True)
    told = refused(proved)
    assert told.returncode == 2
    assert "proved is not what was saved: model.safetensors was altered" in told.stderr
    assert "--no-probes" in told.stderr
    assert "Traceback" not in told.stderr
    server = start("--no-probes", models=[proved])
    assert httpx.get(f"{server.url}/ready").status_code == 200
