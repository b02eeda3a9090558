"""The verbs over texts and images: what they print, and their one line for what cannot be."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.test_images import clip, pictures, vision
from tests.tasks.tiny import TEXTS, make

import polyhead as ph
from polyhead.cli.texts import print_table, progress

LABELS = ("bad", "fine", "good")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory for each head."""
    folder = tmp_path_factory.mktemp("models")
    for head in ("lm", "classify", "tag", "answer"):
        make(folder / head, head, labels=("O", "B-PER", "I-PER") if head == "tag" else LABELS)
    vision(folder / "vit")
    clip(folder / "clip")
    return folder


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_classify_in_the_order_of_texts(cli, models, monkeypatch, tmp_path):
    expected = ph.Classifier(ph.load(models / "classify"), ph.tokenizer(models / "classify"))(TEXTS)
    rows = records(cli("classify", models / "classify", *TEXTS, "--json").out)
    assert [row["text"] for row in rows] == TEXTS
    assert [row["label"] for row in rows] == [one.label for one in expected]
    assert [row["scores"] for row in rows] == [pytest.approx(dict(one.scores)) for one in expected]
    stdin(monkeypatch, "\r\n".join(TEXTS).encode() + b"\n")
    assert records(cli("classify", models / "classify", "-", "--json").out) == rows
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    found = cli("classify", models / "classify", "--file", tmp_path / "texts.txt", "--json")
    assert records(found.out) == rows
    page = cli("classify", models / "classify", *TEXTS, "--top-k", 2).out
    assert len(page.splitlines()) == 1 + 2 * len(TEXTS)
    assert f"{expected[0].score:.4f}" in page.splitlines()[1]


def test_texts_that_are_cut_are_counted_on_standard_error(cli, models):
    long = "Ada wrote a program. " * 40
    found = cli("classify", models / "classify", long, "Ada", "--json")
    assert [row["cut"] for row in records(found.out)] == [True, False]
    assert "of 1 of 2 texts the end was not read: the model takes 64 tokens" in found.err
    assert cli("classify", models / "classify", "Ada").err == ""


def test_embedded_and_ranked_texts_that_are_cut_are_counted_too(cli, models, tmp_path):
    long = "Ada wrote a program. " * 40
    said = "texts the end was not read: the model takes 64 tokens"
    for shown in ((), ("--json",), ("--out", tmp_path / "vectors.npy")):
        found = cli("embed", models / "lm", long, "Ada", long, *shown)
        assert found.err.count(f"of 2 of 3 {said}\n") == 1
    (tmp_path / "help.txt").write_text(f"Ada\n{long}\nGrace\n")
    ranked = cli("similar", models / "lm", long, "--among", tmp_path / "help.txt")
    assert ranked.err == f"of 2 of 4 {said}\n"
    for verb in ("embed", "similar"):
        assert cli(verb, models / "lm", "Ada", "Grace").err == ""


def numbers(value: Any) -> list[float]:
    """All that stand anywhere in a record, in their order."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for each in inner for number in numbers(each)]
    return [value] if isinstance(value, float) else []


VERBS = {
    "embed": ["{lm}", "--file", "{lines}"],
    "similar": ["{lm}", "Ada", "--among", "{lines}"],
    "classify": ["{classify}", "--file", "{lines}"],
    "tag": ["{tag}", "--file", "{lines}"],
    "answer": ["{answer}", "Who?", "Where?", "--context", "{lines}"],
    "fill": ["{lm}", "--file", "{lines}"],
    "classify images": ["{vit}", "--file", "{images}"],
}


@pytest.fixture
def packings(monkeypatch) -> list[Any]:
    """The models that verbs pack, from here on."""
    import polyhead.kernels

    seen, pack = [], polyhead.kernels.pack
    monkeypatch.setattr(polyhead.kernels, "pack", lambda model: seen.append(model) or pack(model))
    return seen


@pytest.mark.parametrize("verb", VERBS)
def test_much_work_is_done_by_a_packed_model(cli, models, tmp_path, monkeypatch, packings, verb):
    (tmp_path / "lines").write_text("\n".join(f"{text} [MASK]" for text in TEXTS * 12))
    (tmp_path / "images").write_text("\n".join(pictures(tmp_path, 3)))
    files = {path.name: path for path in (*models.iterdir(), *tmp_path.iterdir())}
    words = [verb.split()[0], *(word.format(**files) for word in VERBS[verb]), "--json"]
    found = cli(*words)
    assert (found.code, len(packings)) == (0, 1), found.err
    monkeypatch.setattr("polyhead.serve.opening._WORTH_PACKING", 1e9)
    plain = cli(*words)
    assert len(packings) == 1
    assert numbers(records(plain.out)) == pytest.approx(
        numbers(records(found.out)), rel=1e-4, abs=1e-5
    )


def test_a_few_texts_are_not_worth_packing(cli, models, packings):
    assert cli("embed", models / "lm", *TEXTS).code == 0
    assert packings == []


def test_packing_goes_on_where_nothing_compiles(models, tmp_path, monkeypatch, packings, capfd):
    from polyhead.cli.main import main
    from polyhead.kernels.native import _compiled, _tell

    (tmp_path / "lines").write_text("\n".join(TEXTS * 20))
    words = ["classify", str(models / "classify"), "--file", str(tmp_path / "lines"), "--json"]
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    try:
        for compiler in ("no-such-compiler", "false"):
            monkeypatch.setenv("CXX", compiler)
            _compiled.cache_clear()
            _tell.cache_clear()
            assert main(words) == 0
            seen = capfd.readouterr()
            assert len(seen.out.splitlines()) == 20 * len(TEXTS)
            assert seen.err.startswith("polyhead: no kernels of our own: ")
            assert seen.err.count("\n") == 1
    finally:
        _compiled.cache_clear()
        _tell.cache_clear()
    assert len(packings) == 2


def test_a_model_of_images_is_none_of_texts(cli, models):
    for words in (("tag", models / "vit", "Ada"), ("embed", models / "vit", "Ada")):
        found = cli(*words)
        assert found.code == 2
        assert "which reads images; name a model of texts" in found.err
    refused = cli("classify", models / "vit", "a.png", "--pairs")
    assert (refused.code, "--pairs is for texts" in refused.err) == (2, True)


def test_classify_pairs_and_images(cli, models, tmp_path):
    (row,) = records(
        cli("classify", models / "classify", "Ada\tin London", "--pairs", "--json").out
    )
    classify = ph.Classifier(ph.load(models / "classify"), ph.tokenizer(models / "classify"))
    assert row["scores"] == pytest.approx(dict(classify("Ada", "in London")[0].scores))
    paths = pictures(tmp_path, 3)
    assert [r["text"] for r in records(cli("classify", models / "vit", *paths, "--json").out)] == (
        paths
    )
    found = cli("classify", models / "clip", *paths, "--labels", "a cat", "a dog", "--json")
    assert [sorted(row["scores"]) for row in records(found.out)] == [["a cat", "a dog"]] * 3


def test_tag_answer_and_fill(cli, models, tmp_path):
    for row in records(cli("tag", models / "tag", *TEXTS, "--json").out):
        for one in row["entities"]:
            assert row["text"][one["start"] : one["end"]] == one["text"]
    words = cli("tag", models / "tag", "Ada  lives here", "--words").out.splitlines()
    assert [line.split()[-1] for line in words] == ["entity", "Ada", "lives", "here"]
    (tmp_path / "story.txt").write_text(TEXTS[2] * 5, encoding="utf-8")
    found = cli(
        "answer", models / "answer", "Who?", "What weaves?", "--context", tmp_path / "story.txt",
        "--top-k", 2, "--json",
    )  # fmt: skip
    rows = records(found.out)
    assert [row["question"] for row in rows] == ["Who?", "What weaves?"]
    for row in rows:
        for one in row["answers"]:
            assert (TEXTS[2] * 5)[one["start"] : one["end"]] == one["text"]
    assert "(none)" in cli(
        "answer", models / "answer", "Who?", "--text", "Ada.", "--impossible", "--top-k", 9
    ).out  # fmt: skip
    (row,) = records(cli("fill", models / "lm", "Ada [MASK] a [MASK].", "--top-k", 3, "--json").out)
    assert [len(mask) for mask in row["masks"]] == [3, 3]
    page = cli("fill", models / "lm", "Ada [MASK].", "--top-k", 3).out
    assert len(page.splitlines()) == 4


def test_embed_and_similar(cli, models, tmp_path):
    import numpy as np

    expected = ph.embed(ph.load(models / "lm"), ph.tokenizer(models / "lm"), TEXTS).numpy()
    rows = records(cli("embed", models / "lm", *TEXTS, "--json").out)
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    out = tmp_path / "vectors.npy"
    found = cli("embed", models / "lm", *TEXTS, "--out", out, "--truncate-dim", 8)
    assert (found.code, found.out) == (0, "")
    assert np.load(out).shape == (len(TEXTS), 8)
    assert cli("embed", models / "lm", *TEXTS).out.splitlines()[1].split()[0] == "32"
    (row,) = records(cli("similar", models / "lm", TEXTS[1], *TEXTS, "--json").out)
    assert row["matches"][0]["index"] == 1
    (tmp_path / "help.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    found = cli("similar", models / "lm", *TEXTS[:2], "--among", tmp_path / "help.txt", "--json")
    assert [row["matches"][0]["index"] for row in records(found.out)] == [0, 1]
    assert cli("similar", models / "lm", *TEXTS).out.startswith("cosine")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["classify", "{lm}", "x"], "BertForMaskedLM has the head 'lm'"),
        (["tag", "{lm}", "x"], "--objective tag"),
        (["answer", "{lm}", "x", "--text", "y"], "--objective answer"),
        (["fill", "{tag}", "[MASK]"], "--objective masked-lm"),
        (["fill", "{lm}", "no mask"], "text 0 has no mask to fill; write [MASK]"),
        (["classify", "{classify}"], "there is no text or image"),
        (["classify", "{classify}", " "], "is empty"),
        (["classify", "{classify}", "x", "--pairs"], "'x' is no pair"),
        (["classify", "{classify}", "x", "--labels", "a", "b"], "--labels is for"),
        (["classify", "{classify}", "x", "--top-k", "0"], "--top-k is 0"),
        (["classify", "{clip}", "x.png"], "knows no classes; name them"),
        (["classify", "{vit}", "no-such.png"], "no image file no-such.png"),
        (["classify", "{vit}", "{lm}/config.json"], "config.json"),
        (["answer", "{answer}", "Who?"], "give the text to look in"),
        (["answer", "{answer}", "Who?", "--text", " "], "the context is empty"),
        (["answer", "{answer}", "moth " * 70, "--text", "y"], "ask in fewer words"),
        (["tag", "{tag}", "--file", "no-such.txt"], "cannot read no-such.txt"),
        (["similar", "{lm}", "alone"], "nothing to rank"),
        (["embed", "{lm}", "x", "--out", "a.txt"], "does not end in .npy"),
        (["embed", "{lm}", "x", "--truncate-dim", "0"], "--truncate-dim is 0"),
        (["tag", "{tag}", "x", "--window", "65"], "1 to the model's 64"),
        (["classify", "{classify}", "x", "--device", "moon"], "device 'moon'"),
    ],
)
def test_one_line_for_what_cannot_be(cli, models, words, said):
    names = {path.name: path for path in models.iterdir()}
    found = cli(*(word.format(**names) for word in words))
    assert found.code == 2
    assert found.out == ""
    assert len(found.err.splitlines()) == 1
    assert said in found.err


def test_files_that_are_no_texts(cli, models, monkeypatch, tmp_path):
    (tmp_path / "latin.txt").write_bytes("wörld".encode("latin-1"))
    (tmp_path / "gap.txt").write_text("one\n\nthree\n")
    for name, said in (("latin.txt", "is not UTF-8"), ("gap.txt", "line 2 of")):
        found = cli("classify", models / "classify", "--file", tmp_path / name)
        assert (found.code, len(found.err.splitlines())) == (2, 1)
        assert said in found.err
    stdin(monkeypatch, b"")
    assert "standard input is empty" in cli("tag", models / "tag", "-").err


def test_a_gguf_of_a_family_that_the_format_does_not_know(cli, tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "bert.gguf"
    writer = GGUFWriter(path, "nonsense")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = cli("classify", path, "x")
    assert (found.code, len(found.err.splitlines())) == (2, 1)
    assert "nonsense" in found.err


@pytest.mark.parametrize("verb", ["classify", "tag", "answer", "fill", "embed", "similar", "diff"])
def test_help_teaches_by_examples(cli, verb):
    found = cli(verb, "--help")
    assert found.code == 0
    assert found.out.count(f"polyhead {verb} ") >= 4


def test_a_table_cuts_what_is_long_and_breaks_no_line(capsys):
    print_table(("score", "text"), [(0.5, "x" * 500), (12.25, "two\nlines [bold]")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("…")
    assert lines[2] == "12.2500  two lines [bold]"


def test_progress_keeps_quiet_where_nobody_looks(capsys):
    with progress("counting") as tell:
        tell(1, 2)
    assert capsys.readouterr().err == ""
