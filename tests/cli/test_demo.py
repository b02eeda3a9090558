import json
import math

import pytest

from polyhead.cli import demo
from polyhead.models.load import load, tokenizer


@pytest.fixture
def small(monkeypatch):
    text = "\n\n".join(f"The word {i} is a long line of text, number {i * i}." for i in range(150))
    monkeypatch.setattr("polyhead.cli.corpora.pydocs", lambda: text)
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "d_ff": 32}
    monkeypatch.setattr(demo, "SIZES", sizes)
    monkeypatch.setattr(demo, "CONTEXT", 32)


def test_the_demo_leaves_a_model_and_a_report_and_can_be_run_again(small, tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out), "--steps", "6"]) == 0
    assert demo.main(["--out", str(out), "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert "Replacing the demo" in printed.err
    assert "bits per byte" in printed.out
    bits = json.loads((out / "demo.json").read_text())["bits_per_byte"]
    assert len(bits) == 3
    assert all(math.isfinite(value) and value > 0 for value in bits.values())
    page = (out / "report.html").read_text()
    assert all(title in page for title in ("Loss", "Comparison", "Where one head looks", "Step 6"))
    ids = tokenizer(out).encode("The word 3")
    assert tokenizer(out).config["model_max_length"] == load(out).config.max_tokens
    assert load(out)(__import__("torch").tensor([ids])).shape == (1, len(ids), len(tokenizer(out)))


def test_the_demo_loads_in_transformers(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    out = tmp_path / "demo"
    demo.run(out, 2)
    words = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    text = "The word 12 is long."
    assert words(text, add_special_tokens=False)["input_ids"] == tokenizer(out).encode(text)
    ids = torch.tensor([tokenizer(out).encode(text)])
    torch.testing.assert_close(
        model(ids).logits, load(out, dtype="float32")(ids), atol=1e-5, rtol=0
    )


def test_the_demo_replaces_nothing_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert demo.main(["--out", str(tmp_path), "--steps", "1"]) == 2
    assert "not the demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_no_long_line_of_the_held_out_text_is_learned():
    corpus = demo.split()
    learned = {line.strip() for line in corpus.train.split("\n")}
    held = {line.strip() for line in corpus.held_out.split("\n")}
    assert not [line for line in learned & held if len(line) >= 20]
    assert 0.05 <= len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out)) <= 0.12


def test_steps_follow_the_pace(small, monkeypatch):
    words = demo._tokenizer(demo.split())
    monkeypatch.setattr(demo, "SECONDS", 1e6)
    assert demo._affordable_steps(words) == demo.FULL_STEPS
    monkeypatch.setattr(demo, "SECONDS", 0)
    assert demo._affordable_steps(words) == demo.LEAST_STEPS
