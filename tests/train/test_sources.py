"""Documents are the same from wherever they are read."""

import builtins
import csv
import gzip
import io
import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.train import hf, sources
from polyhead.train.blend import Corpus, open_corpora, read_blend, texts_of
from polyhead.train.corpus import load_tokens
from polyhead.train.sources import Texts

from .conftest import text, tiny

TEXTS = [text(3, seed) for seed in range(5)] + ['a "quoted" one, with\ttabs\nand lines', "ünïcödé"]
ROWS = [{"id": number, "text": one} for number, one in enumerate(TEXTS)]


def as_csv(rows, **options):
    out = io.StringIO(newline="")
    writer = csv.writer(out, **options)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return out.getvalue().encode()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n\n" for row in rows).encode()


def write(folder, kind, rows=ROWS):
    """A source of a kind that holds rows."""
    path = folder / f"data.{kind}"
    if kind == "parquet":
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    elif kind.startswith("jsonl"):
        path.write_bytes(gzip.compress(jsonl(rows)) if kind.endswith("gz") else jsonl(rows))
    elif kind.startswith("csv"):
        path.write_bytes(gzip.compress(as_csv(rows)) if kind.endswith("gz") else as_csv(rows))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind in ("hf", "hf-stream"):
        (path / "data").mkdir(parents=True)
        (path / "data" / "train.jsonl").write_bytes(jsonl(rows))
        (path / "data" / "test.jsonl").write_bytes(jsonl(rows[:2]))
        return f"{kind}:{path}"
    elif kind == "dataset":
        return datasets.Dataset.from_list(rows).with_format("numpy")
    elif kind == "stream":
        return datasets.IterableDataset.from_generator(lambda: iter(rows))
    elif kind == "rows":
        return rows
    elif kind == "generator":
        return (row for row in rows)
    return path


KINDS = (
    *("jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "saved", "hf", "hf-stream", "dataset"),
    *("stream", "rows", "generator"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["text", "body"])
def test_every_kind_has_the_same_documents(tmp_path, kind, column):
    rows = [{"id": row["id"], column: row["text"]} for row in ROWS]
    texts = Texts(write(tmp_path, kind, rows), column)
    assert list(texts.documents()) == TEXTS
    assert list(texts.documents()) == TEXTS, "as often as need be"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_list(tmp_path, tokenizer, kind):
    size = tokenizer.vocab_size
    rows = [row for row in ROWS if row["text"].isascii()][:4]
    whole = load_tokens([row["text"] for row in rows], tokenizer, tmp_path / "a", vocab_size=size)
    found = load_tokens(write(tmp_path, kind, rows), tokenizer, tmp_path / "b", vocab_size=size)
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.ends.tolist() == whole.ends.tolist()
    assert found.text_bytes == whole.text_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_reading_tells_how_far_it_is(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "PIECE", 256)
    reading = Texts(write(tmp_path, kind, [{"text": text(100, n)} for n in range(20)] * 16)).read()
    seen = [reading.done for _ in reading]
    assert seen == sorted(seen)
    if kind not in ("stream", "hf-stream"):
        assert 0 < seen[0] < reading.total / 2, "the first document does not wait for the last"
        assert reading.done == reading.total
    else:
        assert reading.total == 0


def test_a_file_that_is_no_table_is_one_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 64)
    long = text(60)
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "a.md").write_text(long)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(long.encode()))
    for name in ("a.txt", "a.md", "a.txt.gz"):
        pieces = list(Texts(tmp_path / name).read())
        assert "".join(piece for piece, _ in pieces) == long
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
        assert len(pieces) > 9


def test_a_folder_holds_all_kinds_by_path(tmp_path):
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "notes.md").write_text("not read")
    for number, kind in enumerate(("jsonl", "csv.gz", "parquet")):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, kind, [{"text": kind}])
    assert list(Texts(tmp_path).documents()) == ["jsonl", "csv.gz", "parquet", "last"]


@pytest.mark.parametrize(
    ("written", "options", "found"),
    [
        ("one\t1\ntwo\t2\n", {"column": "0"}, ["one", "two"]),
        ("one\t1\ntwo\t2\n", {"names": ("text", "n")}, ["one", "two"]),
        ("n\ttext\n1\tone\n2\t\n", {}, ["one"]),
        ("", {}, []),
    ],
)
def test_columns_without_a_header(tmp_path, written, options, found):
    (tmp_path / "a.tsv").write_text(written)
    assert list(Texts(tmp_path / "a.tsv", **options).documents()) == found


def test_splits_are_named(tmp_path):
    name = write(tmp_path, "hf")
    assert len(list(Texts(name).documents())) == len(TEXTS)
    assert len(list(Texts(f"{name},,test").documents())) == 2
    assert len(list(Texts(f"{name},default,test").documents())) == 2
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(tmp_path / "both")
    assert list(Texts(tmp_path / "both" / "train").documents()) == TEXTS
    with pytest.raises(DataError, match=r"has the splits 'train': name one"):
        Texts(tmp_path / "both")
    with pytest.raises(DataError, match=r"of several splits .*'train'"):
        Texts(both)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_missing_is_said_with_those_there_are(tmp_path, kind):
    with pytest.raises(DataError, match=r"no column 'body'; it has 'id', 'text'") as error:
        list(Texts(write(tmp_path, kind), "body").documents())
    assert "--text" in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_sources_say_what_to_do(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-9])
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "wide.csv").write_text("text,n\na,1\nb\n")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    (tmp_path / "broken").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "broken" / name).write_text("{}")
    cases = [
        (tmp_path / "bad.parquet", "is not Parquet"),
        (tmp_path / "cut.jsonl.gz", "cannot read"),
        (tmp_path / "no.jsonl.gz", "cannot read"),
        (tmp_path / "odd.jsonl", "line 2 is a list"),
        (tmp_path / "bad.jsonl", "line 2: not JSON"),
        (tmp_path / "wide.csv", "line 3: 1 columns where there should be 2"),
        (tmp_path / "null.parquet", "row 1: 'text' is a NoneType"),
        (tmp_path / "broken", "cannot be opened"),
        ([{"text": "a"}, {"text": 3}], "row 1 of 2 texts: 'text' is a int"),
        (7, "not a int"),
        (f"hf:{tmp_path / 'none'}", "cannot be opened"),
        (f"hf:{write(tmp_path, 'hf')[3:]},,other", "cannot be opened"),
    ]
    for source, says in cases:
        with pytest.raises(DataError) as error:
            list(Texts(source).documents())
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="names no dataset"):
        Texts("hf:a,b,c,d")


def test_a_stream_that_breaks_is_said_in_a_line(tmp_path):
    def broken():
        yield {"text": "a"}
        raise ConnectionError("gone\naway")

    stream = datasets.IterableDataset.from_generator(broken)
    with pytest.raises(DataError, match=r"cannot be read \(.*gone") as error:
        list(Texts(stream).documents())
    assert "\n" not in str(error.value)


def test_libraries_that_are_not_there_are_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    saved, table = write(tmp_path, "saved"), write(tmp_path, "parquet")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"polyhead\[datasets\]"):
        Texts(saved)
    with pytest.raises(ConfigError, match=r"polyhead\[datasets\]"):
        Texts("hf:one")
    with pytest.raises(ConfigError, match=r"polyhead\[data\]"):
        list(Texts(table).documents())


def test_nothing_is_a_dataset_where_the_library_was_never_loaded(monkeypatch):
    monkeypatch.delitem(hf.sys.modules, "datasets")
    assert not hf.is_dataset(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "dataset"])
def test_contents_are_hashed_once_a_run(tmp_path, tokenizer, monkeypatch, kind):
    read = []
    digest = Texts._digest
    monkeypatch.setattr(Texts, "_digest", lambda *a: read.append(1) or digest(*a))
    config = ph.TrainConfig(
        steps=1, batch_size=1, context=8, validate_every=1, out=str(tmp_path / "run")
    )
    trainer = ph.Trainer(tiny(tokenizer.vocab_size), tokenizer, config, quiet=True)
    rows = [row for row in ROWS if row["text"].isascii()][:5]
    found = trainer.fit(write(tmp_path, kind, rows))
    assert "valid_loss" in found
    assert len(read) == 1


def test_the_digest_knows_the_column(tmp_path):
    path = write(tmp_path, "jsonl", [{"a": "x", "b": "y"}])
    assert Texts(path, "a").digest("") != Texts(path, "b").digest("")
    assert Texts(path, "a").digest("") == Texts(path, "a").digest("")


def test_a_trainer_reads_the_column_it_is_told(tmp_path, tokenizer):
    rows = [{"body": text(20)}]
    config = ph.TrainConfig(steps=1, batch_size=1, context=8, out=str(tmp_path / "run"))
    model = tiny(tokenizer.vocab_size)
    trainer = ph.Trainer(model, tokenizer, config, columns={"text": "body"}, quiet=True)
    trainer.fit(rows)
    assert trainer.evaluate(rows)["bytes"] == len(rows[0]["body"])
    wrong = ph.Trainer(model, tokenizer, config, columns={"label": "body"}, quiet=True)
    with pytest.raises(ConfigError, match="no role 'label'; texts have text alone"):
        wrong.fit(rows, force=True)


def test_corpora_of_a_blend_have_columns_of_their_own(tmp_path):
    write(tmp_path, "csv", [{"body": "from a", "id": 1}])
    (tmp_path / "b.jsonl").write_text('{"text": "from b"}\n')
    name = write(tmp_path, "hf", [{"text": "from c"}])
    (tmp_path / "mix.toml").write_text(
        f'[a]\ndata = "data.csv"\ntext = "body"\n[b]\ndata = "b.jsonl"\n[c]\ndata = "{name}"\n'
    )
    found = open_corpora(read_blend(tmp_path / "mix.toml"))
    assert list(texts_of(found)) == ["from a", "from b", "from c"]
    assert found == open_corpora(found)
    assert isinstance(found["a"], Corpus)
