"""Runs beside each other."""

import json

import pytest

from .test_train import SMALL


@pytest.fixture
def runs(cli, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. \n" * 30)
    folders = [tmp_path / "runs" / name for name in ("slow", "fast")]
    for folder, lr in zip(folders, (0.001, 0.01), strict=True):
        done = cli("train", file, *SMALL, "--steps", 4, "--lr", lr, "--out", folder)
        assert done.code == 0, done.err
    return folders


def test_what_differs_and_what_came_of_it(cli, runs, tmp_path):
    page = tmp_path / "page.html"
    done = cli("compare", *runs, "--out", page)
    assert done.code == 0, done.err
    lines = {line.split("  ")[0].strip(): line.split()[-2:] for line in done.out.splitlines()}
    assert lines["lr"] == ["0.001", "0.01"]
    assert "steps" in lines
    assert not any(name in lines for name in ("batch_size", "context", "out"))
    html = page.read_text()
    for word in ("Held-out loss", "Gradient", "Speed", "Memory", "slow, step 4", "polyline"):
        assert word in html
    assert "<script" not in html
    assert cli("compare", *runs, "--out", page).code == 2
    assert cli("compare", *runs, "--out", page, "--force").code == 0


def test_for_scripts(cli, runs):
    done = cli("compare", *runs, "--json")
    first, second = (json.loads(line) for line in done.out.splitlines())
    assert (first["run"], second["run"]) == ("slow", "fast")
    assert first["steps"] == 4
    assert first["best_valid_loss"] <= first["valid_loss"]
    assert second["settings"]["lr"] == 0.01


def test_what_is_no_run_is_refused(cli, tmp_path):
    done = cli("compare", tmp_path)
    assert done.code == 2
    assert "is no training run" in done.err
    assert cli("compare").code == 2
