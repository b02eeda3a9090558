"""A compiler that is missing or fails is said once, and torch computes instead."""

import os
import subprocess
import sys
import warnings

import pytest

from polyhead.kernels import native


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(native, "home", lambda: tmp_path)
    native._tell.cache_clear()
    yield
    native._tell.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-g++", "no no-such-g\\+\\+ is there"), ("false", "false failed with code 1")],
)
def test_a_compiler_that_does_not_serve_is_said_once(monkeypatch, compiler, said):
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(UserWarning, match=said):
        assert native._compiled.__wrapped__("norm", "") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native._compiled.__wrapped__("rotate", "") is None


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "kernels").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept .*kernels.*POLYHEAD_HOME"):
        assert native._compiled.__wrapped__("norm", "") is None


def test_the_command_line_says_it_in_one_line_and_goes_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven. " * 40)
    train = ["train", text, "--set", "d_model=16", "num_layers=1", "num_heads=2", "--steps", "1"]
    words = [*train, "--context", "8", "--batch-size", "2", "--out", tmp_path / "run"]
    env = os.environ | {"CXX": "no-such-g++", "POLYHEAD_HOME": str(tmp_path)}

    def run(*words):
        command = [sys.executable, "-m", "polyhead.cli.main", *map(str, words)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True)

    run(*words)
    done = run("generate", tmp_path / "run", "one", "--max-new-tokens", "8", "--temperature", "0")
    said = [line for line in done.stderr.splitlines() if "kernels" in line]
    assert len(said) == 1
    assert said[0].startswith("polyhead: no kernels of our own: no no-such-g++ is there")
    assert "no-such" not in done.stdout
