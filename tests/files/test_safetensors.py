"""Safetensors: what is written reads back, here and elsewhere, and no lie in a file is believed."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyhead.errors import FileError
from polyhead.files.safetensors import DTYPES, SafetensorsFile, open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def same(left, right) -> bool:
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in right
    )


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def row(dtype="F32", shape=(1,), begin=0, end=4) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    for opened in (open_checkpoint(tmp_path), open_checkpoint(tmp_path / "model.safetensors")):
        assert same(dict(opened), TENSORS)
    assert SafetensorsFile(tmp_path / "model.safetensors").metadata == {"format": "pt"}


def test_the_library_reads_what_is_written(tmp_path):
    write_checkpoint(tmp_path, TENSORS, metadata={"more": "words"})
    assert same(load_file(tmp_path / "model.safetensors"), TENSORS)
    opened = SafetensorsFile(tmp_path / "model.safetensors")
    assert opened.metadata == {"format": "pt", "more": "words"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_survives(tmp_path, dtype):
    bytes_ = torch.arange(2 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = bytes_.view(dtype).view(2, 1)
    write_checkpoint(tmp_path, {"odd": torch.tensor([1], dtype=torch.uint8), "x": tensor})
    found = open_checkpoint(tmp_path)["x"]
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_unaligned_data_and_views_that_never_reach_the_file(tmp_path):
    header = {"odd": row("U8", (1,), 0, 1), "x": row("F32", (2,), 1, 9)}
    path = raw_file(
        tmp_path / "m.safetensors", header, b"\x07" + torch.tensor([1.0, 2.0]).numpy().tobytes()
    )
    before = path.read_bytes()
    opened = open_checkpoint(path)
    assert opened["x"].tolist() == [1.0, 2.0]
    opened["odd"].fill_(9)
    assert path.read_bytes() == before


def test_shards_round_trip_and_replace_each_other(tmp_path):
    write_checkpoint(tmp_path, TENSORS, max_shard_bytes=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    assert len(set(index["weight_map"].values())) > 1
    assert same(dict(open_checkpoint(tmp_path)), TENSORS)
    other = {"only": torch.ones(2)}
    write_checkpoint(tmp_path, other)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(dict(open_checkpoint(tmp_path)), other)
    write_checkpoint(tmp_path, TENSORS, max_shard_bytes=16)
    assert same(dict(open_checkpoint(tmp_path)), TENSORS)


def test_transformers_reads_the_shards(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config.save_pretrained(tmp_path)
    write_checkpoint(tmp_path, weights, max_shard_bytes=1000)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert same(again.state_dict(), model.state_dict())


def test_writing_is_deterministic_and_leaves_nothing_after_a_failure(tmp_path):
    for name, order in (("one", list(TENSORS)), ("two", list(reversed(TENSORS)))):
        write_checkpoint(tmp_path / name, {key: TENSORS[key] for key in order})
    first, second = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    before = first.read_bytes()

    class Failing(dict):
        reads = 0

        def __getitem__(self, name):
            raise MemoryError("in the middle of writing")

    with pytest.raises(MemoryError):
        write_checkpoint(tmp_path / "one", Failing(TENSORS))
    assert first.read_bytes() == before
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["model.safetensors"]


LIES = {
    "no JSON": b"{nope",
    "not an object": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "NaN": b'{"a": NaN}',
    "deep": b"[" * 100_000,
    "too many parts": b"[" + b"1," * 2_100_000 + b"1]",
    "long number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    "double name": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "double key": b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "half a surrogate": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "metadata": {"__metadata__": {"a": 1}},
    "row": {"a": 5},
    "missing key": {"a": {"dtype": "F32", "shape": [1]}},
    "further key": {"a": row() | {"more": 1}},
    "dtype": {"a": row("F33")},
    "dtype no string": {"a": row(["F32"])},
    "shape no list": {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 4]}},
    "negative size": {"a": row(shape=(-1,))},
    "true as a size": {"a": row(shape=(True,))},
    "fractions": {"a": row(shape=(1.0,))},
    "overflow": {"a": row(shape=(2**33, 2**33))},
    "overflow behind zero": {"a": row(shape=(0, 2**62), end=0)},
    "dimensions": {"a": row(shape=(1,) * 65)},
    "offsets": {"a": row(begin=4, end=0)},
    "negative offset": {"a": row(begin=-4, end=0)},
    "huge offset": {"a": row(begin=2**70, end=2**70 + 4)},
    "three offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
    "wrong length": {"a": row(shape=(2,))},
    "overlap": {"a": row(), "b": row(begin=2, end=6), "c": row("U8", (2,), 6, 8)},
    "same place": {"a": row(), "b": row(), "c": row(begin=4, end=8)},
    "gap": {"a": row(), "b": row("U8", (2,), 6, 8)},
    "past the end": {"a": row(), "b": row(begin=4, end=8), "c": row(begin=8, end=12)},
    "bytes left over": {"a": row()},
    "long name": {"n" * 2000: row(), "b": row(begin=4, end=8)},
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_refused_in_one_line(tmp_path, header):
    path = raw_file(tmp_path / "m.safetensors", header, bytes(8))
    with pytest.raises(FileError) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_a_huge_header_length_costs_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (99_000_000, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(FileError, match="header length"):
            open_checkpoint(path)


def test_truncation_and_mutation_give_only_our_error(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    path = tmp_path / "t.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            open_checkpoint(path)
    dice, faults = random.Random(0), []
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken))] = dice.randrange(256)
        path.write_bytes(broken)
        try:
            for tensor in open_checkpoint(path).values():
                tensor.reshape(-1).view(torch.uint8).sum()
        except FileError as error:
            faults.append(str(error))
    assert len(faults) > 100
    assert not any("\n" in fault for fault in faults)


INDEXES = {
    "no JSON": "{",
    "no map": "{}",
    "map of numbers": '{"weight_map": {"a": 1}}',
    "escape": '{"weight_map": {"a": "../other.safetensors"}}',
    "absolute": '{"weight_map": {"a": "/etc/other.safetensors"}}',
    "windows": '{"weight_map": {"a": "C:\\\\other.safetensors"}}',
    "pickle": '{"weight_map": {"a": "pytorch_model.bin"}}',
    "missing shard": '{"weight_map": {"a": "gone.safetensors"}}',
    "missing tensor": '{"weight_map": {"b": "model-1.safetensors"}}',
    "double": '{"weight_map": {}, "weight_map": {}}',
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_a_faulty_index_is_refused(tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder / "model-1.safetensors", tmp_path / "other.safetensors"):
        save_file({"a": torch.ones(1)}, place)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        (["pytorch_model.bin"], "pickle"),
        ([], "no model.safetensors"),
        (["a.safetensors", "b.safetensors"], "2 other"),
    ],
)
def test_a_directory_without_a_checkpoint_says_why(tmp_path, files, word):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileError, match=word):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "empty", "tiny"])
def test_no_file_to_speak_of(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    if kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"1234567")
    with pytest.raises(FileError, match=r"m\.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"": torch.ones(1)},
        {"__metadata__": torch.ones(1)},
        {"s": torch.ones(2, 2).to_sparse()},
        {"q": torch.ones(1, dtype=torch.complex128)},
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors):
    with pytest.raises(FileError):
        write_checkpoint(tmp_path, tensors)
