"""Compiled blocks learn as those that are written."""

import shutil
from functools import partial

import pytest
import torch
from tests.train.launching import LLAMA, losses, run, tensors

from polyhead.errors import ConfigError

MOE = {"family": "mixtral", "sizes": {**LLAMA["sizes"], "num_experts": 4}}


@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing here compiles C++")
@pytest.mark.parametrize(
    ("job", "settings", "backend"),
    [(LLAMA, {"recompute": "half"}, "inductor"), (MOE, {"accumulate": 1}, "eager")],
)
def test_compiled_blocks_make_the_same_run_and_compile_once(
    tmp_path, monkeypatch, job, settings, backend
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # What is compiled once is found by tracing; to make code of it takes the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for name in ("written", "compiled"):
        config = {**settings, "compile": name == "compiled", "out": str(tmp_path / name)}
        # Steps, blocks that are alike, accumulated batches and what follows a validation share it.
        with torch._dynamo.config.patch(error_on_recompile=True):
            trainer = run({**job, "config": config})
        assert all("forward" not in vars(part) for part in trainer.model.modules())
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "written"), abs=1e-5)
    written, compiled = tensors(tmp_path / "written"), tensors(tmp_path / "compiled")
    assert written.keys() == compiled.keys()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "compiled or not?"


def test_without_a_compiler_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile needs a compiler, and no-such-compiler is not"):
        run({"config": {"compile": True, "out": str(tmp_path)}})
