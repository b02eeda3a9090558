import json

import pytest

import polyhead as ph

WORDS = "the quick brown fox jumps over the lazy dog, and it was a very quick one".split()
SMALL = (
    *("--set", "d_model=16", "num_layers=2", "num_heads=2"),
    *("--batch-size", 2, "--context", 24, "--validate-batches", 1, "--held-out", 0.4),
)
ROWS = {
    "masked-lm": ("bert", "lm", ("choice=span", "ratio=0.2")),
    "nsp": ("bert", "pretraining", ()),
    "sop": ("albert", "pretraining", ("mask=0.9",)),
    "replaced-token": ("deberta-v2", "rtd", ("weight=20",)),
    "span-corruption": ("t5", "lm", ("density=0.3",)),
}


@pytest.fixture
def documents(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = (" ".join(WORDS[i:] + WORDS[:i]) * 4 for i in range(12))
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ROWS)
def test_an_objective_and_nothing_else_named(cli, documents, tmp_path, name):
    family, head, options = ROWS[name]
    out = tmp_path / "run"
    words = ("--objective", name, *SMALL, "--steps", 2, "--out", out)
    told = ("--options", *options) if options else ()
    found = cli("train", documents, *words, *told)
    assert found.code == 0, found.err
    model = ph.load(out / "checkpoints" / "step-00000002")
    assert model.config.model_type == family
    assert model.head_kind == head
    again = cli("train", "--out", out, "--resume", "--log-every", 1)
    assert again.code == 0, again.err


def test_sift_stands_beside_an_objective(cli, documents, tmp_path):
    out = tmp_path / "run"
    words = ("--objective", "masked-lm", *SMALL, "--steps", 2, "--log-every", 1, "--out", out)
    assert cli("train", documents, *words, "--sift", 5).code == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert records[0]["sift"] > 0
    assert json.loads((out / "run.json").read_text())["sift"] == 5
    assert cli("train", "--out", out, "--resume").code == 0
    refused = cli("train", "--out", out, "--resume", "--sift", 1)
    assert refused.code == 2
    assert "--sift is taken from the run" in refused.err
    other = ("--model", "gpt2", *SMALL, "--steps", 2, "--out", tmp_path / "gpt2", "--sift", 5)
    refused = cli("train", documents, *other)
    assert refused.code == 2
    assert "gpt2 has none" in refused.err
