import builtins
import csv
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from polyhead.errors import ConfigError, DataError
from polyhead.files import lines
from polyhead.train import records
from polyhead.train.records import ExampleColumns, read_table

WANTED = {"text": True, "label": True, "pair": False}
ROWS = [
    {"text": 'a "quoted" cat', "label": "yes"},
    {"text": "two, with a comma", "label": "no"},
    {"text": "naïve 猫", "label": "yes"},
]


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "tsv":
        path.write_text("label\ttext\n" + "".join(f"{r['label']}\t{r['text']}\n" for r in ROWS))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({**r, "id": 1}) + "\n\n" for r in ROWS))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{**r, "id": 1} for r in ROWS]), path)
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_rows(tmp_path, kind):
    table = read_table(write(tmp_path, kind), WANTED)
    assert [table[i] for i in range(len(table))] == ROWS
    assert [row["label"] for row in map(table.take([2, 1]).__getitem__, range(2))] == ["yes", "no"]
    assert table.digest == read_table(str(write(tmp_path, kind)), WANTED).digest
    swapped = ExampleColumns({"text": "label", "label": "text"})
    assert read_table(tmp_path / f"rows.{kind}", WANTED, swapped).digest != table.digest


def test_rows_in_memory():
    table = read_table(iter(ROWS), WANTED)
    assert [table[i] for i in range(3)] == ROWS
    assert read_table(ROWS[:2], WANTED).digest != table.digest
    large = [np.zeros(5000), np.zeros(5000)]
    large[1][2500] = 1
    digests = {read_table([{"text": a, "label": 1}], WANTED).digest for a in (*large, large[0])}
    assert len(digests) == 2


def test_columns_without_a_header(tmp_path):
    path = tmp_path / "posts.tsv"
    path.write_text("0.5\tI said \"no\r\n-1\tit's\n")
    by_number = read_table(path, WANTED, ExampleColumns({"text": "1", "label": "0"}))
    assert [by_number[i] for i in range(2)] == [
        {"text": 'I said "no', "label": "0.5"},
        {"text": "it's", "label": "-1"},
    ]
    spec = ExampleColumns({"label": "rating"}, ("rating", "text"))
    named = read_table(path, WANTED, spec)
    assert [named[i] for i in range(2)] == [by_number[i] for i in range(2)]
    with pytest.raises(DataError, match=r"has 2 columns, and 1 are named \('text'\)"):
        read_table(path, WANTED, ExampleColumns({}, ("text",)))
    path.write_text("rating\ttext\n0.5\ta\n")
    said_twice = read_table(path, WANTED, spec)
    assert (len(said_twice), said_twice[0]) == (1, {"text": "a", "label": "0.5"})
    path.write_text("1\t0\na\tb\n")
    headed = read_table(path, WANTED, ExampleColumns({"text": "0", "label": "1"}))
    assert headed[0] == {"text": "b", "label": "a"}


def test_a_column_that_need_not_be_there_is_taken_where_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1, "pair": "b"}\n')
    assert read_table(path, WANTED)[0] == {"text": "a", "label": 1, "pair": "b"}
    with pytest.raises(DataError, match="no column 'other'"):
        read_table(path, WANTED, ExampleColumns({"pair": "other"}))


def test_a_byte_order_mark_and_line_breaks_in_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,label\r\n"two\r\nlines",1\r\n\r\n'.encode())
    table = read_table(path, WANTED)
    assert (len(table), table[0]) == (1, {"text": "two\r\nlines", "label": "1"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", b"", "holds no rows"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.tsv", b"text\tlabel\na\tb\nc\n", "line 3: 1 columns where there should be 2"),
        ("a.csv", b'text,label\na,b\n"c,d\n', "line 3: unexpected end of data"),
        ("a.tsv", b"text\tlabel\na\tb\n\xff\tb\n", "line 3: not UTF-8"),
        ("a.tsv", b"text\ttext\na\tb\n", "'text' twice"),
        ("a.tsv", b"words\tlabel\na\tb\n", "no column 'text'; it has 'words', 'label'"),
        ("a.csv", b"fine,good\nodd,bad\n", "or all columns, if its first line is no header$"),
        ("a.jsonl", b'{"words": "a"}\n', "it has 'words': name yours for text, label$"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n[1]\n', "line 2 is a list"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "a"}\n', "line 2 differs .* 'label'"),
        ("a.parquet", b"PAR1", "not Parquet"),
        ("a.xml", b"", "ends in .tsv"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read_table(path, WANTED)
    assert "\n" not in str(error.value)


def test_missing_and_enormous_files_and_roles(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "none.tsv", WANTED)
    with pytest.raises(ConfigError, match="no role 'title'; a row here has text, label, pair"):
        read_table(ROWS, WANTED, ExampleColumns({"title": "text"}))
    with pytest.raises(DataError, match="row 1 is a str"):
        read_table([ROWS[0], "a"], WANTED)
    monkeypatch.setattr(records, "MOST_BYTES", 3)
    with pytest.raises(DataError, match="split it"):
        read_table(write(tmp_path, "tsv"), WANTED)


def test_parquet_names_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"polyhead\[data\]"):
        read_table(path, WANTED)


def test_a_field_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MOST_FIELD", 100)
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{'a' * 101},1\n")
    with pytest.raises(DataError, match="line 2: field larger"):
        read_table(path, WANTED)
