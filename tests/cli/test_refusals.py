import io
import os
import sys

import pytest

from polyhead.cli.main import main
from polyhead.models.load import load, tokenizer


@pytest.mark.parametrize(
    "name", ["generation_config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
)
def test_convert_without_force_touches_nothing_that_is_there(cli, plain, tmp_path, name):
    file = tmp_path / name
    file.write_text("{}")
    found = cli("convert", plain, tmp_path, "--to", "hf")
    assert found.code == 2
    assert f"{name} is there already" in found.err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_convert_with_force_leaves_nothing_of_the_old_model(cli, plain, tmp_path):
    model = load(plain)
    model.generation = {}
    model.save(tmp_path / "silent")
    tokenizer(plain).save(tmp_path / "silent", force=True)
    (tmp_path / "silent" / "generation_config.json").unlink(missing_ok=True)
    model.generation = {"temperature": 0.5}
    model.save(tmp_path / "out")
    assert cli("convert", tmp_path / "silent", tmp_path / "out", "--to", "hf", "--force").code == 0
    assert "temperature" not in load(tmp_path / "out").generation


def test_a_page_whose_reader_has_gone_ends_as_other_verbs_do(cli, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            if text:
                raise BrokenPipeError
            return 0

        def fileno(self):
            return spare

    with open(os.devnull, "w") as file:
        spare = file.fileno()
        monkeypatch.setattr(sys, "stdout", Gone())
        assert main(["info", "gpt2"]) == 141
