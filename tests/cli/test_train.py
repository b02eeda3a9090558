import json
import signal

import pytest

from polyhead.cli.corpora import corpus, without_lines_of
from polyhead.errors import DataError
from polyhead.models.load import load, tokenizer
from polyhead.train import running

SMALL = (
    *("--set", "d_model=16", "num_layers=1", "num_heads=2"),
    *("--batch-size", 2, "--context", 16, "--validate-batches", 1, "--log-every", 2),
    *("--sample-every", 2, "--sample-tokens", 5),
)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. \n" * 30)
    return file


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_train_writes_a_run_that_generates(cli, text, tmp_path, family):
    out = tmp_path / "run"
    found = cli("train", text, "--model", family, *SMALL, "--steps", 4, "--out", out)
    assert found.code == 0, found.err
    assert found.out.strip() == str(out / "checkpoints" / "step-00000004")
    assert {"config.toml", "run.json", "log.jsonl", "report.html"} <= {
        p.name for p in out.iterdir()
    }
    assert json.loads((out / "run.json").read_text())["model"] == family
    made = out / "checkpoints" / "step-00000004"
    assert tokenizer(made).config["model_max_length"] == load(made).config.max_tokens
    page = (out / "report.html").read_text()
    assert "polyline" in page
    assert "Where one head looks" in page
    assert cli("generate", out, "the", "--max-new-tokens", 4).code == 0
    again = cli("train", text, *SMALL, "--steps", 4, "--out", out)
    assert again.code == 2
    assert "already holds a run" in again.err


def test_flags_win_over_the_file(cli, text, tmp_path):
    (tmp_path / "run.toml").write_text("steps = 2\nbatch_size = 2\ncontext = 16\nlr = 0.5\n")
    out = tmp_path / "run"
    words = ("--config", tmp_path / "run.toml", "--lr", 0.002, "--out", out)
    assert cli("train", text, "--set", "d_model=16", *words).code == 0
    saved = (out / "config.toml").read_text()
    assert "steps = 2\n" in saved
    assert "lr = 0.002\n" in saved


def test_an_interrupted_run_goes_on(cli, text, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert cli("train", text, *SMALL, "--steps", 4, "--out", whole).code == 0
    step = running.Running._step

    def interrupted(self, number):
        step(self, number)
        if number == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(running.Running, "_step", interrupted)
    found = cli("train", text, *SMALL, "--steps", 4, "--out", part)
    assert found.code == 143
    assert "stopped after step 2" in found.err
    about = (part / "run.json").read_bytes()
    assert json.loads(about)["data"] == str(text)
    monkeypatch.setattr(running.Running, "_step", step)
    for flags in (["--model", "llama"], ["--set", "num_layers=2"], ["--tokenizer", "bytes"]):
        refused = cli("train", "--out", part, "--resume", *flags)
        assert refused.code == 2
        assert f"{flags[0]} is taken from the run" in refused.err
    assert cli("train", "--out", part, "--resume", "--log-every", 1).code == 0
    assert (part / "run.json").read_bytes() == about
    weights = "checkpoints/step-00000004/model.safetensors"
    assert (whole / weights).read_bytes() == (part / weights).read_bytes()


def test_a_checkpoint_goes_on_learning(cli, plain, text, tmp_path):
    words = ("--steps", 1, "--batch-size", 2, "--context", 16, "--sample-every", 0)
    found = cli("train", text, "--model", plain, *words, "--out", tmp_path / "more")
    assert found.code == 0, found.err
    assert tokenizer(found.out.strip()).vocab_size == tokenizer(plain).vocab_size
    assert "fresh model" in cli("train", text, "--model", plain, "--set", "d_model=3").err


def test_a_run_that_goes_on_keeps_its_validation_text(cli, text, tmp_path):
    held, out = tmp_path / "held.txt", tmp_path / "run"
    held.write_text("the lazy dog jumps over the quick brown fox. \n" * 4)
    words = ("--valid", held, "--steps", 2, "--schedule", "constant", "--out", out)
    assert cli("train", text, *SMALL, *words).code == 0
    held.unlink()
    found = cli("train", "--out", out, "--resume", "--steps", 3)
    assert found.code == 2
    assert "held.txt" in found.err
    assert cli("train", "--out", out, "--resume", "--steps", 3, "--valid", text).code == 0
    assert json.loads((out / "run.json").read_text())["valid"] == str(held)


def test_a_failed_start_with_force_keeps_the_old_run(cli, text, tmp_path):
    out = tmp_path / "run"
    assert cli("train", text, *SMALL, "--steps", 1, "--out", out).code == 0
    kept = (out / "run.json").read_bytes()
    words = ("--device", "toaster", "--force", "--out", out)
    assert cli("train", text, "--model", "llama", *SMALL, *words).code == 2
    assert (out / "run.json").read_bytes() == kept
    assert cli("generate", out, "the", "--max-new-tokens", 1).code == 0


def test_a_transformer_is_a_decoder(cli, text, tmp_path):
    words = (*SMALL, "--model", "transformer", "--steps", 1, "--out", tmp_path / "run")
    found = cli("train", text, *words)
    assert found.code == 0, found.err
    assert load(found.out.strip()).config.kind == "decoder"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_of_a_fresh_model(cli, text, tmp_path, kind):
    words = ("--tokenizer", kind, "--vocab-size", 280, "--steps", 1, "--out", tmp_path / "run")
    found = cli("train", text, *SMALL, *words)
    assert found.code == 0, found.err
    assert load(found.out.strip()).config.vocab_size == tokenizer(found.out.strip()).vocab_size
    assert "tokenizer 'words'" in cli("train", text, "--tokenizer", "words").err


def test_embedded_corpora():
    (docs,) = corpus("pydocs")
    assert len(docs) > 300_000
    with pytest.raises(DataError, match="pydocs, stdlib"):
        corpus("pydoc")


def test_lines_of_the_held_out_text_are_not_learned():
    shared = "a line that is long enough to tell"
    kept = without_lines_of(
        f"first\n  {shared}\nshort\nanother long line of its own", f"short\n{shared}"
    )
    assert kept == "first\nshort\nanother long line of its own"


def test_an_adapter_is_trained_resumed_and_generates(tmp_path, cli, chatty, text):
    out = tmp_path / "run"
    words = ("train", text, "--model", chatty, "--lora", "rank=2", "targets=q,up", *SMALL[4:])
    assert cli(*words, "--steps", 4, "--schedule", "constant", "--out", out).code == 0
    assert cli("train", "--out", out, "--resume", "--steps", 6).code == 0
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    assert (last / "adapter_config.json").exists()
    assert not list(last.glob("model*"))
    for words in ((out,), (last,), (chatty, "--adapter", out)):
        done = cli("generate", *words, "the quick", "--raw", "--max-new-tokens", 3)
        assert done.code == 0, done.err
    refused = cli("train", "--out", out, "--resume", "--lora", "rank=4")
    assert refused.code
    assert "--lora is taken from the run" in refused.err
    refused = cli("train", text, "--model", "gpt2", "--lora", "--out", tmp_path / "b")
    assert refused.code
    assert "is a family" in refused.err
    refused = cli("train", text, "--model", chatty, "--lora", "ranks=2", "--out", tmp_path / "b")
    assert refused.code
    assert "there is no field 'ranks'" in refused.err


def test_a_blend_of_corpora(tmp_path, cli, text):
    (tmp_path / "other.txt").write_text("a lazy dog sat on the brown fox. \n" * 30)
    mix = tmp_path / "mix.toml"
    mix.write_text(f'[one]\ndata = "{text.name}"\nweight = 3\n[two]\ndata = "other.txt"\n')
    out = tmp_path / "run"
    done = cli("train", mix, *SMALL, "--steps", 4, "--out", out)
    assert done.code == 0, done.err
    assert cli("generate", out, "the", "--max-new-tokens", 2).code == 0
    mix.write_text("")
    refused = cli("train", mix, *SMALL, "--steps", 4, "--out", tmp_path / "b")
    assert refused.code == 2
    assert "names no corpora" in refused.err


def test_documents_are_told_apart_after_an_interruption_too(tmp_path, cli):
    (tmp_path / "texts").mkdir()
    for name in "abcdef":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the {name} fox jumps. " * 9)
    out = tmp_path / "run"
    words = (*SMALL, "--options", "by_document=true", "--schedule", "constant", "--out", out)
    assert cli("train", tmp_path / "texts", *words, "--steps", 2).code == 0
    done = cli("train", "--out", out, "--resume", "--steps", 4)
    assert done.code == 0, done.err
    assert json.loads((out / "run.json").read_text())["options"] == ["by_document=true"]
