"""The ladder: every rung for the same FLOPs, on the same held-out bytes, kept and resumed."""

import json
import math
import signal

import pytest

from polyhead.cli import climbing, ladder
from polyhead.cli.corpora import split
from polyhead.cli.ladder_view import LadderView
from polyhead.errors import ConfigError
from polyhead.models.load import load
from polyhead.models.ngram import NGram
from polyhead.tasks.perplexity import perplexity, scorable
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.rungs import MOST_EPOCHS, RUNGS, TOKENS_A_WEIGHT, planned

SMALL = ("--context", 16, "--batch-size", 2, "--device", "cpu")
TEXT = "".join(f"The word {i} is a long line of text, number {i * i}.\n\n" for i in range(120))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_every_rung_spends_the_budget_and_is_scored_alike(cli, file, tmp_path):
    out = tmp_path / "ladder"
    done = cli("ladder", file, *SMALL, "--flops", "20M", "--out", out)
    assert done.code == 0, done.err
    state = json.loads((out / "ladder.json").read_text())
    rungs = state["rungs"]
    assert tuple(rungs) == ladder.NAMES
    held_out = split(TEXT).held_out
    assert state["corpus"]["held_out_bytes"] == len(held_out.encode())
    for name, one in rungs.items():
        assert one["sample"].startswith(state["corpus"]["prompt"])
        assert name in done.out
        if name == "ngram":
            assert one["flops"] == 0
            model = NGram.load(out / "ngram")
            ids, size = scorable(Tokenizer.load(out / "ngram"), held_out)
            nats = -float(model.log_probs(ids)[1:].sum())
            assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
            continue
        a_step = one["flops_per_token"] * 2 * 16
        assert abs(one["flops"] - 20e6) <= a_step / 2
        run = out / "runs" / name
        model = load(ladder_model(run))
        words = Tokenizer.load(ladder_model(run))
        score = perplexity(model, words, held_out, context=16, stride=4)
        assert one["bits_per_byte"] == pytest.approx(score.bits_per_byte, abs=1e-4)
        assert one["memory_bytes"] > 1 << 20
        assert one["parameters"] == model.num_parameters()
    page = (out / "report.html").read_text()
    for word in ("The ladder", "Comparison", "% of the budget", "What it writes", "window-mlp"):
        assert word in page
    assert "<script" not in page
    assert cli("compare", *(out / "runs").iterdir()).code == 0


def ladder_model(run):
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    return checkpoint


def test_goes_on_where_it_stopped(cli, file, tmp_path, monkeypatch):
    flags = (file, *SMALL, "--flops", "20M", "--rungs", "ngram", "bigram", "gpt")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("ladder", *flags, "--out", whole).code == 0

    def stop(self, record):
        if record["step"] >= 3 and self.name == "gpt":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(LadderView, "tell", stop)
        done = cli("ladder", *flags, "--out", parts)
    assert done.code == 130
    assert "--resume" in done.err
    assert list(json.loads((parts / "ladder.json").read_text())["rungs"]) == ["ngram", "bigram"]

    trained = []
    train = climbing.train
    monkeypatch.setattr(climbing, "train", lambda name, *a: trained.append(name) or train(name, *a))
    done = cli("ladder", "--out", parts, "--resume", "--json")
    assert done.code == 0, done.err
    assert trained == ["gpt"]
    again = json.loads(done.out)["rungs"]
    first = json.loads((whole / "ladder.json").read_text())["rungs"]
    for name, one in first.items():
        assert again[name]["bits_per_byte"] == one["bits_per_byte"]
        assert again[name]["sample"] == one["sample"]
    done = cli("ladder", "--out", parts, "--resume", "--flops", "30M")
    assert done.code == 2
    assert "begun with flops = '20M'" in done.err
    file.write_text(TEXT + "And more.\n")
    done = cli("ladder", "--out", parts, "--resume")
    assert done.code == 2
    assert "not the text" in done.err


def test_what_stands_is_not_written_over(cli, file, tmp_path):
    out = tmp_path / "ladder"
    flags = (file, *SMALL, "--flops", "5M", "--rungs", "bigram", "--out", out)
    assert cli("ladder", *flags).code == 0
    done = cli("ladder", *flags)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    (out / "mine.txt").write_text("mine")
    assert cli("ladder", *flags, "--force").code == 0
    assert (out / "mine.txt").exists()
    done = cli("ladder", file, "--out", tmp_path, "--force")
    assert done.code == 2
    assert "no ladder's" in done.err
    assert file.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--flops", "many"), "is no number"),
        (("--flops", "-1T"), "is no number"),
        (("--flops", "100"), "less than a step"),
        (("--flops", "1E"), "more than bigram can spend"),
        (("--rungs", "bigram", "rnn"), "no rung 'rnn'"),
        (("--rungs", "gpt", "gpt"), "each rung once"),
        (("--rates", "gpt=fast"), "gpt=2e-3"),
        (("--rates", "ngram=1"), "gpt=2e-3"),
        (("--context", "4"), "8 or more"),
        (("--context", "9000"), "give more text"),
        (("--vocab-size", "300"), "--tokenizer bpe"),
        (("--tokenizer", "wordpiece"), "tokenizer"),
    ],
)
def test_bad_input_is_one_line(cli, file, tmp_path, flags, said):
    done = cli("ladder", file, "--out", tmp_path / "ladder", *flags)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize(("text", "value"), [("4e12", 4e12), ("4T", 4e12), ("1.5g", 1.5e9)])
def test_flops_have_suffixes(text, value):
    assert ladder.parse_flops(text) == value


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_the_rule_of_sizes(rung):
    rich = planned(rung, 1e12, 100, 128, 8, 10**9)
    poor = planned(rung, 1e12, 100, 128, 8, 10**5)
    tokens, repeated = (plan.steps * 1024 for plan in (rich, poor))
    assert tokens == pytest.approx(TOKENS_A_WEIGHT * rich.weights, rel=0.5)
    assert repeated == pytest.approx(MOST_EPOCHS * 10**5, rel=0.5)
    for plan in (rich, poor):
        assert plan.flops_per_token * plan.steps * 1024 == pytest.approx(1e12, rel=0.01)


def test_what_is_held_out_begins_a_paragraph():
    found = split(TEXT)
    assert TEXT.endswith("\n\n" + found.held_out)
    assert 0.05 < len(found.held_out) / len(TEXT) < 0.2
    assert split("word " * 100).held_out.startswith("word")
    assert len(split("x" * 100).held_out) == 10
    with pytest.raises(ConfigError):
        ladder.parse_flops("0")
