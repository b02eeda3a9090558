import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.explain.models import VISION

import polyhead as ph

SAID = "the quick brown fox jumps over the lazy dog. the quick brown"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    ph.build("vit", seed=0, **{**VISION, "num_layers": 2, "d_ff": 24}).save(folder)
    ph.Processor(size=None).save(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "dots.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    return path


def test_a_page_and_what_it_says(cli: Callable, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    ran = cli("explain", plain, SAID, "--out", out)
    assert ran.code == 0
    assert out.stat().st_size < 2_000_000
    assert "<polyhead-inside" in out.read_text("utf-8")
    for word in ("goes on with:", "Induction", "Previous token", "Sinks", "Delimiters"):
        assert word in ran.out
    assert str(out) in ran.err


def test_what_was_found_for_scripts(cli: Callable, plain: Path) -> None:
    ran = cli("explain", plain, SAID, "--json")
    found = json.loads(ran.out)
    assert found["out"] is None
    assert {"Induction", "Widest"} <= {one["title"] for one in found["findings"]}
    for one in found["findings"]:
        values = [head["value"] for head in one["heads"]]
        assert values == sorted(values, reverse=True)
        assert all(f".{head['layer']}.attention" in head["name"] for head in one["heads"])
        assert one["token"] is None or one["token"]["text"]


def test_a_text_of_a_file_is_read(cli: Callable, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text(SAID, "utf-8")
    by_file = cli("explain", plain, tmp_path / "said.txt")
    assert by_file.out == cli("explain", plain, SAID).out
    assert "5 tokens" in cli("explain", plain, SAID, "--max-tokens", 5).out


def test_an_image(cli: Callable, vit: Path, picture: Path, tmp_path: Path) -> None:
    ran = cli("explain", vit, "--image", picture, "--out", tmp_path / "page.html")
    assert ran.code == 0
    assert "17 patches and tokens" in ran.out
    assert "data:image/jpeg" in (tmp_path / "page.html").read_text("utf-8")


def test_nothing_is_overwritten_unasked(cli: Callable, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("mine")
    refused = cli("explain", plain, SAID, "--out", out)
    assert refused.code == 2
    assert "--force" in refused.err
    assert out.read_text() == "mine"
    assert cli("explain", plain, SAID, "--out", out, "--force").code == 0
    assert out.read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give it a text"),
        ([" "], "empty"),
        (["a"], "one token"),
        ([SAID, "--second", "no"], "leave the second out"),
        ([SAID, "--layers", "layers.9"], "layers.{0-1}.attention"),
        ([SAID, "--max-tokens", "0"], "max_tokens is 0"),
        ([SAID, "--force"], "--out"),
        ([SAID * 20], "128"),
        ([SAID, "--image", "no.png"], "leave the image out"),
    ],
)
def test_bad_input_is_one_line(cli: Callable, plain: Path, words: list[str], said: str) -> None:
    ran = cli("explain", plain, *words)
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_images_that_are_none(cli: Callable, vit: Path, tmp_path: Path) -> None:
    assert "give it an image" in cli("explain", vit).err
    assert "leave the text out" in cli("explain", vit, "a word").err
    assert "no image file" in cli("explain", vit, "--image", tmp_path / "no.png").err
    (tmp_path / "bad.png").write_bytes(b"nothing")
    assert cli("explain", vit, "--image", tmp_path / "bad.png").code == 2
