"""`polyhead prepare`, and training on what it makes and on the columns of tables."""

import csv
import json

import pyarrow
import pytest
from pyarrow import parquet

from polyhead.cli.watch import Watch
from polyhead.train import sources, tokens

SMALL = (
    *("--set", "d_model=16", "num_layers=1", "num_heads=2"),
    *("--batch-size", 2, "--context", 16, "--validate-batches", 1, "--log-every", 1),
    *("--sample-every", 0, "--steps", 2),
)
TEXTS = [f"the {word} sat on the mat and saw the {word}.\n" * 4 for word in "cat dog cow".split()]
SHARDS = ("--workers", 1, "--shard-tokens", 100)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 64)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def weights(run):
    return (run / "checkpoints" / "step-00000002" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("option", [(), ("--options", "by_document=true")])
def test_a_prepared_directory_trains_as_its_texts_do(cli, book, tmp_path, option):
    made = tmp_path / "made"
    found = cli("prepare", book, "--tokenizer", "chars", *SHARDS, "--out", made, "--json")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert said["documents"] == 3
    assert said["shards"] > 1
    assert said["bytes"] == sum(map(len, TEXTS))
    assert cli("train", made, *SMALL, *option, "--out", tmp_path / "a").code == 0
    raw = ("train", book, "--tokenizer", made, *SMALL, *option, "--out", tmp_path / "b")
    assert cli(*raw).code == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert "Where one head looks" in (tmp_path / "a" / "report.html").read_text()
    assert cli("train", "--out", tmp_path / "a", "--resume", "--log-every", 2).code == 0
    # The run has the same tokenizer, and so may go on from it.
    more = ("--model", tmp_path / "a", "--context", 16, "--steps", 1, "--out", tmp_path / "c")
    assert cli("train", made, *more).code == 0


def test_what_is_stopped_goes_on(cli, book, tmp_path, monkeypatch):
    words = ("prepare", book, "--tokenizer", "chars", *SHARDS, "--out")
    assert cli(*words, tmp_path / "whole").code == 0
    finish = tokens.Writer.finish

    def stopping(self, header):
        finish(self, header)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens.Writer, "finish", stopping)
    found = cli(*words, tmp_path / "part")
    assert found.code == 130
    assert "the same command goes on with it" in found.err
    refused = cli("train", tmp_path / "part", *SMALL, "--out", tmp_path / "run")
    assert refused.code == 2
    assert "is not finished" in refused.err
    monkeypatch.setattr(tokens.Writer, "finish", finish)
    found = cli(*words, tmp_path / "part")
    assert found.code == 0, found.err
    assert "going on with the tokenizer in" in found.err
    for path in (tmp_path / "whole").rglob("*.*"):
        there = tmp_path / "part" / path.relative_to(tmp_path / "whole")
        assert there.read_bytes() == path.read_bytes()


def test_the_tokenizer_of_a_model(cli, plain, book, tmp_path):
    words = ("prepare", book, "--tokenizer", plain, *SHARDS, "--out", tmp_path / "made")
    found = cli(*words)
    assert found.code == 0, found.err
    assert "tokens of 3 documents in" in found.out
    assert cli("train", tmp_path / "made", "--model", plain, "--context", 16, "--steps", 1,
               "--out", tmp_path / "run").code == 0  # fmt: skip


def test_refusals_are_a_line_each(cli, plain, book, tmp_path):
    made = tmp_path / "made"
    words = ("prepare", book, "--tokenizer", "chars", *SHARDS)
    assert cli(*words, "--out", made).code == 0
    (tmp_path / "other.jsonl").write_text('{"body": "a", "id": 1}\n')
    run = ("--out", tmp_path / "run")
    cases = [
        (("prepare", "none", *words[2:], *run), "no such file or folder: none"),
        (("prepare", tmp_path / "other.jsonl", *words[2:], *run), "it has 'body', 'id'"),
        ((*words, "--out", book.parent), "holds other files"),
        ((*words, "--workers", 0, *run), "1 at least"),
        ((*words, "--shard-tokens", 7, "--out", made), "another shard_tokens"),
        (("prepare", book, "--tokenizer", plain, "--out", made), "another tokenizer"),
        (("prepare", book, "--tokenizer", plain, "--vocab-size", 9, *run), "has its own"),
        (("prepare", book, "--tokenizer", "none/at/all", *run), "none/at/all"),
        (("prepare", made, "--tokenizer", "chars", *run), "holds tokens, not texts"),
        (("train", made, "--model", plain, "--context", 16, *run), "with another tokenizer"),
        (("train", made, "--tokenizer", "bpe", *run), "leave out --tokenizer"),
        (("train", made, "--tokenizer", plain, *SMALL, *run), "with another tokenizer"),
        (("train", tmp_path / "other.jsonl", *SMALL, *run), "it has 'body', 'id'"),
        (("train", book, "--label", "body", *SMALL, *run), "no role 'label'"),
    ]
    for number, (command, says) in enumerate(cases):
        found = cli(*command)
        assert found.code == 2, number
        assert says in found.err, number
        last = found.err.strip().splitlines()[-1]
        assert says in last, number
    assert cli(*words, "--out", made, "--shard-tokens", 7, "--force").code == 0


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_a_table_is_a_corpus(cli, tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "body"])
            writer.writerows(enumerate(TEXTS))
    else:
        parquet.write_table(pyarrow.table({"body": TEXTS, "id": [0, 1, 2]}), path)
    out = tmp_path / "run"
    found = cli("train", path, "--text", "body", *SMALL, "--out", out)
    assert found.code == 0, found.err
    assert json.loads((out / "run.json").read_text())["roles"] == ["text=body"]
    found = cli("train", "--out", out, "--resume", "--log-every", 2)
    assert found.code == 0, found.err
    made = ("--tokenizer", out, "--text", "body", *SHARDS, "--out", tmp_path / "made")
    assert cli("prepare", path, *made).code == 0
    assert cli("train", tmp_path / "made", *SMALL, "--out", tmp_path / "again").code == 0
    assert weights(out) == weights(tmp_path / "again")


def test_a_blend_of_texts_and_tokens(cli, book, tmp_path):
    assert cli("prepare", book, "--tokenizer", "chars", "--out", tmp_path / "made").code == 0
    (tmp_path / "more.csv").write_text("body\n" + "the cat and the cow\n" * 9)
    (tmp_path / "mix.toml").write_text(
        '[a]\ndata = "made"\n[b]\ndata = "more.csv"\ntext = "body"\nweight = 0.5\n'
    )
    found = cli("train", tmp_path / "mix.toml", *SMALL, "--out", tmp_path / "run")
    assert found.code == 0, found.err


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys):
    with Watch("tokenising", every=0.0) as watch:
        watch(50, 100, "1,234 tokens")
        watch(60, 0, "2,345 tokens")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tokenising: 50%  1,234 tokens")
    assert lines[1].startswith("tokenising: 2,345 tokens")
