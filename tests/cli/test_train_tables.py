import csv
import json

import pytest
from tests.train.tables import WORDS, bert, classes, sentences, wordpiece

from polyhead.models.load import load, tokenizer

SMALL = (
    *("--set", "d_model=32", "num_layers=1", "num_heads=2", "init_std=0.1"),
    *("--steps", 30, "--batch-size", 8, "--context", 16, "--warmup", 2, "--lr", 3e-3),
)


@pytest.fixture
def table(tmp_path):
    """A CSV file whose label follows from the first word."""
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(classes(120))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny encoder with a masked-LM head."""
    made = wordpiece()
    bert(made, "lm").save(tmp_path / "bert")
    made.save(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_fresh_model_on_a_table(cli, table, tmp_path):
    out = tmp_path / "run"
    found = cli("train", table, "--objective", "classify", *SMALL, "--out", out)
    assert found.code == 0, found.err
    best = found.out.strip()
    model = load(best)
    assert (model.config.model_type, model.head_kind) == ("bert", "classify")
    assert model.config.labels == ("high", "low", "middle")
    assert tokenizer(best).cls_id is not None
    assert "accuracy" in found.err
    about = json.loads((out / "run.json").read_text())
    assert (about["objective"], about["roles"], about["data"]) == ("classify", [], str(table))
    page = (out / "report.html").read_text()
    assert "held-out accuracy" in page
    assert "Loss by step" in page
    assert "steps = 30\n" in (out / "config.toml").read_text()


def test_a_checkpoint_gets_a_head_and_sensible_settings(cli, table, checkpoint, tmp_path):
    out = tmp_path / "run"
    words = ("--objective", "classify", "--model", checkpoint, "--out", out)
    found = cli("train", table, *words, "--epochs", 0.5, "--validate-every", 1)
    assert found.code == 0, found.err
    saved = (out / "config.toml").read_text()
    for line in ("lr = 5e-05", "batch_size = 32", "weight_decay = 0.01", "steps = 2"):
        assert f"{line}\n" in saved
    assert load(found.out.strip()).config.labels == ("high", "low", "middle")
    # The head that is there is kept where the classes are the same.
    again = cli(
        "train", table, "--objective", "classify", "--model", out, "--steps", 1, "--lr", 1e-9,
        "--out", tmp_path / "more",
    )  # fmt: skip
    assert again.code == 0, again.err
    before, after = (load(path.strip()).head.classifier.weight for path in (found.out, again.out))
    assert (before - after).abs().max() < 1e-6


def test_columns_by_number_and_by_name(cli, checkpoint, tmp_path):
    path = tmp_path / "posts.tsv"
    path.write_text("".join(f"{i / 3:.2f}\t{' '.join(w)}\n" for i, w in enumerate(sentences(30))))
    words = ("--objective", "classify", "--model", checkpoint, "--steps", 1)
    for flags in (("--text", 1, "--label", 0), ("--columns", "rating,text", "--label", "rating")):
        found = cli("train", path, *words, *flags, "--out", tmp_path / str(flags[1]))
        assert found.code == 0, found.err
        assert load(found.out.strip()).config.problem == "regression"
        assert "pearson" in found.err
    wrong = cli("train", path, *words, "--label", "rating", "--out", tmp_path / "wrong")
    assert wrong.code == 2
    assert "no column 'text', 'rating'" in wrong.err


def test_a_table_run_goes_on(cli, table, checkpoint, tmp_path):
    out = tmp_path / "run"
    words = ("--objective", "classify", "--model", checkpoint, "--schedule", "constant")
    assert cli("train", table, *words, "--text", "text", "--steps", 2, "--out", out).code == 0
    more = cli("train", "--out", out, "--resume", "--steps", 4)
    assert more.code == 0, more.err
    assert (out / "checkpoints" / "step-00000004").exists()
    refused = cli("train", "--out", out, "--resume", "--label", "text")
    assert refused.code == 2
    assert "--label is taken from the run" in refused.err
    other = cli("train", table, "--out", out, "--resume", "--objective", "tag")
    assert (other.code, "--objective is taken from the run" in other.err) == (2, True)


def test_other_objectives_on_a_checkpoint(cli, checkpoint, tmp_path):
    words = sentences(24)
    rows = {
        "tag": [{"tokens": w, "tags": ["B-X" if x == "cat" else "O" for x in w]} for w in words],
        "answer": [{"q": w[0], "context": " ".join(w), "answer": w[0], "start": 0} for w in words],
        "contrastive": [{"text": " ".join(w), "pair": w[0]} for w in words],
    }
    for name, some in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        flags = ("--roles", "question=q") if name == "answer" else ()
        options = ("--options", "scale=10", "chunk=8") if name == "contrastive" else ()
        found = cli(
            "train", path, "--objective", name, "--model", checkpoint, "--steps", 1, *flags,
            *options, "--out", tmp_path / name,
        )  # fmt: skip
        assert found.code == 0, found.err
        # An embedder is a bare model: pooling has no weights.
        assert load(found.out.strip()).head_kind == ("none" if name == "contrastive" else name)
    more = cli("train", "--out", tmp_path / "contrastive", "--resume", "--steps", 1)
    assert more.code == 0, more.err
    unknown = cli("train", path, "--objective", "contrastive", "--options", "heat=1")
    assert unknown.code == 2
    assert "it has scale, symmetric, chunk" in unknown.err


def test_a_translator_from_nothing(cli, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{w}\t{w.upper()}\n" for w in WORDS * 3))
    words = ("--columns", "source,target", "--objective", "seq2seq", *SMALL[:4])
    found = cli("train", path, *words, "--steps", 2, "--context", 8, "--out", tmp_path / "run")
    assert found.code == 0, found.err
    assert load(found.out.strip()).config.kind == "encoder-decoder"
    assert "bleu" in found.err


def test_several_tasks_of_a_file(cli, table, checkpoint, tmp_path):
    (tmp_path / "tags.jsonl").write_text(
        "".join(
            json.dumps({"tokens": w, "tags": ["N" if x == "cat" else "O" for x in w]}) + "\n"
            for w in sentences(30)
        )
    )
    (tmp_path / "tasks.toml").write_text(
        '[kind]\ndata = "rows.csv"\nhead = "classify"\n[noun]\ndata = "tags.jsonl"\nhead = "tag"\n'
    )
    for model in (checkpoint, "bert"):
        out = tmp_path / f"run-{model == checkpoint}"
        sizes = SMALL[:4] if model == "bert" else ()
        found = cli(
            "train", tmp_path / "tasks.toml", "--objective", "multitask", "--model", model, *sizes,
            "--steps", 2, "--context", 16, "--out", out,
        )  # fmt: skip
        assert found.code == 0, found.err
        assert set(load(found.out.strip()).config.tasks) == {"kind", "noun"}


def test_what_is_wrong_is_one_line(cli, table, checkpoint, tmp_path):
    cases = [
        (("--objective", "sort"), "objective 'sort' is not one of"),
        (("--objective", "classify", "--roles", "title"), "write role=column"),
        (("--objective", "classify", "--roles", "title=text"), "no role 'title'"),
        (("--objective", "image-classify", "--roles", "image=text"), "starts from a checkpoint"),
        (("--objective", "classify", "--problem", "odd", *SMALL), "problem is 'odd'"),
        (("--objective", "classify", "--model", checkpoint, *SMALL), "for a fresh model"),
        (("--objective", "classify", *SMALL, "--sample-every", 5), "writes no texts"),
    ]
    encoder = ("--objective", "masked-lm", "--model", "gpt2", *SMALL)
    cases.append((encoder, "masked-lm needs an encoder"))
    cases.append((("--objective", "classify", "--model", "vit"), "vit is of the kind vision"))
    for flags, says in cases:
        found = cli("train", table, *flags, "--out", tmp_path / "run")
        assert found.code == 2, found.err
        assert says in found.err
        assert len(found.err.strip().splitlines()[-1]) < 400


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": None, "label": "a"}, {"text": "x", "label": "b"}], "text of row 0 is missing"),
        ([{"text": 3, "label": "a"}, {"text": "x", "label": "b"}], "text of row 0 is a int"),
        ([{"text": "x", "label": "a"}, {"text": "x", "label": ""}], "a label is ''"),
    ],
)
def test_what_is_missing_from_a_row_is_said(cli, tmp_path, rows, says):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cli("train", path, "--objective", "classify", *SMALL, "--out", tmp_path / "run")
    assert found.code == 2
    assert says in found.err
