"""GGUF: read and written as the gguf package does it, and no lie in a file is believed."""

import random
import struct
from pathlib import Path

import pytest
import torch

from polyhead.errors import FileError
from polyhead.files import gguf_blocks
from polyhead.files.gguf import open_gguf
from polyhead.files.gguf_types import RawTensor
from polyhead.files.gguf_write import typed, write_gguf

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

VALUES = {
    "general.architecture": "llama",
    "an.integer": 7,
    "a.negative": -7,
    "a.long": 2**40,
    "a.float": 1.5,
    "a.bool": True,
    "a.text": "zwölf\nlines",
    "texts": ["", "é", "x y"],
    "integers": [1, -2, 3],
    "floats": [0.5, 2.0],
    "bools": [True, False],
    "nested": [[1, 2], [3]],
    "u8": typed(200, "uint8"),
    "i8s": typed([-1, 2], "int8"),
    "u16": typed(60000, "uint16"),
    "i16": typed(-3, "int16"),
    "u64": typed(3, "uint64"),
    "f64s": typed([0.1], "float64"),
}
TENSORS = {
    "token_embd.weight": torch.arange(24, dtype=torch.float32).view(4, 6),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "ids": torch.tensor([[3, -4]], dtype=torch.int32),
}
# Byte positions of the fp16 numbers in a block, where random bytes must not make a NaN.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def plain(value):
    return value.value if hasattr(value, "value") else value


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "m.gguf"
    write_gguf(path, VALUES, TENSORS)
    return path


def test_the_gguf_package_reads_what_is_written(written):
    reader = gguf.GGUFReader(written)
    for key, value in VALUES.items():
        flat = [1, 2, 3] if key == "nested" else plain(value)  # the package flattens
        assert reader.fields[key].contents() == flat
    kinds = {key: reader.fields[key].types[-1].name for key in VALUES}
    assert kinds["an.integer"] == "UINT32"
    assert kinds["integers"] == "INT32"
    assert (kinds["u8"], kinds["i8s"], kinds["f64s"]) == ("UINT8", "INT8", "FLOAT64")
    for tensor in reader.tensors:
        found = torch.from_numpy(np.array(tensor.data).view(np.uint8)).flatten()
        assert torch.equal(found, TENSORS[tensor.name].view(torch.uint8).flatten())


def test_reads_what_is_written_and_writes_it_again_bit_for_bit(written, tmp_path):
    file = open_gguf(written)
    assert file.metadata == {key: plain(value) for key, value in VALUES.items()}
    assert list(file) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert file.shape(name) == tuple(tensor.shape)
        assert torch.equal(file.tensor(name, None), tensor)
        assert torch.equal(file[name], tensor.float())
        assert file.tensor(name, torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(file.tensor(name, None, part=0), tensor[0])
        assert torch.equal(file.tensor(name, None, part=len(tensor) - 1), tensor[-1])
    again = tmp_path / "again.gguf"
    write_gguf(again, file.typed_metadata(), {name: file.stored(name) for name in file.names})
    assert again.read_bytes() == written.read_bytes()


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_reads_what_the_gguf_package_writes(tmp_path, alignment):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bé"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    data = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x", data)
    writer.add_tensor("q", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(path)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "bé"]
    assert file.metadata["tokenizer.ggml.scores"] == [0.5, -1.0]
    assert torch.equal(file["x"], torch.from_numpy(data))
    assert file.type_of("q") == "Q8_0"
    assert file.shape("q") == (3, 64)
    assert file.raw("q").shape == packed.shape
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(file["q"], torch.from_numpy(expected))
    assert torch.equal(file.tensor("q", part=2), torch.from_numpy(expected)[2])


def random_blocks(name: str, count: int) -> "np.ndarray":
    dice = np.random.default_rng(1)
    blocks = dice.integers(0, 256, (count, gguf_blocks.BY_NAME[name].size), dtype=np.uint8)
    for at in SCALES[name]:
        scale = dice.normal(size=(count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", SCALES)
def test_dequantisation_is_bit_identical(name):
    kind = gguf.GGMLQuantizationType[name]
    samples = [random_blocks(name, 1100)]  # more than one chunk
    row = gguf_blocks.BY_NAME[name]
    if not name.endswith("K"):
        data = np.random.default_rng(2).normal(size=(40, 64)).astype(np.float32)
        samples.append(gguf.quants.quantize(data, kind).reshape(-1, row.size))
    for blocks in samples:
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind)).flatten()
        flat = torch.from_numpy(blocks.copy()).flatten()
        found = gguf_blocks.dequantize(flat, row)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        low = gguf_blocks.dequantize(flat, row, torch.bfloat16)
        assert torch.equal(low, expected.bfloat16())


def test_block_sizes_are_those_of_the_gguf_package():
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        row = gguf_blocks.TYPES[kind.value]
        assert (row.name, row.weights, row.size) == (kind.name, *sizes)


def test_raw_blocks_pass_through_and_unknown_blocks_say_so(tmp_path):
    q6, q2 = torch.from_numpy(random_blocks("Q6_K", 4)), torch.zeros(84, dtype=torch.uint8)
    tensors = {"a": RawTensor("Q6_K", (2, 512), q6), "b": RawTensor("Q2_K", (1, 256), q2)}
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    file = open_gguf(tmp_path / "m.gguf")
    assert torch.equal(file.raw("a").flatten(), q6.flatten())
    assert file.raw("b").shape == (1, 84)
    with pytest.raises(FileError, match="Q2_K"):
        file["b"]


REFUSED = {
    "nothing": ({"a": None}, {}),
    "too large": ({"a": 2**70}, {}),
    "mixed": ({"a": [1, "x"]}, {}),
    "text as number": ({"a": typed("x", "uint8")}, {}),
    "out of range": ({"a": typed(300, "uint8")}, {}),
    "fraction": ({"a": typed(1.5, "int32")}, {}),
    "bool as number": ({"a": typed(True, "int32")}, {}),
    "number as text": ({"a": typed(1, "string")}, {}),
    "no number": ({"a": typed([None], "float32")}, {}),
    "alignment": ({"general.alignment": 24}, {}),
    "complex": ({}, {"t": torch.ones(1, dtype=torch.complex64)}),
    "scalar": ({}, {"t": torch.tensor(1.0)}),
    "five sizes": ({}, {"t": torch.ones(1, 1, 1, 1, 1)}),
    "empty": ({}, {"t": torch.ones(0, 2)}),
    "long name": ({}, {"t" * 64: torch.ones(1)}),
    "unknown blocks": ({}, {"t": RawTensor("Q9", (32,), torch.zeros(34, dtype=torch.uint8))}),
    "odd rows": ({}, {"t": RawTensor("Q8_0", (33,), torch.zeros(34, dtype=torch.uint8))}),
    "few bytes": ({}, {"t": RawTensor("Q8_0", (32,), torch.zeros(33, dtype=torch.uint8))}),
}


@pytest.mark.parametrize(("metadata", "tensors"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, metadata, tensors):
    with pytest.raises(FileError) as error:
        write_gguf(tmp_path / "m.gguf", metadata, tensors)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_forced(written):
    before = written.read_bytes()
    with pytest.raises(FileError, match="exists"):
        write_gguf(written, {}, {})
    assert written.read_bytes() == before
    write_gguf(written, {}, {}, force=True)
    assert open_gguf(written).metadata == {}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def array(code: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", code, count) + items


def info(name="t", shape=(8,), code=0, offset=0, dims=None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = struct.pack("<I", len(shape) if dims is None else dims)
    return text(name) + count + sizes + struct.pack("<IQ", code, offset)


def head(tensors=0, pairs=0, version=3, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


SPARE = bytes(4096)
NESTED = array(9, 1) * 6
LIES = {
    "magic": head(magic=b"GGML") + SPARE,
    "version 1": head(version=1) + SPARE,
    "version 4": head(version=4) + SPARE,
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + SPARE,
    "tensors": head(tensors=2**63) + SPARE,
    "pairs": head(pairs=2**64 - 1) + SPARE,
    "more pairs than bytes": head(pairs=1000) + SPARE,
    "key length": head(pairs=1) + struct.pack("<Q", 2**62) + SPARE,
    "key past the end": head(pairs=1) + struct.pack("<Q", 60000) + SPARE,
    "empty key": head(pairs=1) + pair("", 0, b"\1") + SPARE,
    "key not UTF-8": head(pairs=1) + struct.pack("<Q", 1) + b"\xff" + SPARE,
    "double key": head(pairs=2) + pair("a", 0, b"\1") * 2 + SPARE,
    "value type": head(pairs=1) + pair("a", 13, b"\1") + SPARE,
    "bool": head(pairs=1) + pair("a", 7, b"\2") + SPARE,
    "bools": head(pairs=1) + pair("a", 9, array(7, 2, b"\1\2")) + SPARE,
    "text length": head(pairs=1) + pair("a", 8, struct.pack("<Q", 2**50)) + SPARE,
    "text not UTF-8": head(pairs=1) + pair("a", 8, struct.pack("<Q", 1) + b"\xff") + SPARE,
    "array count": head(pairs=1) + pair("a", 9, array(4, 2**62)) + SPARE,
    "array past the end": head(pairs=1) + pair("a", 9, array(10, 1000)) + SPARE,
    "array of texts": head(pairs=1) + pair("a", 9, array(8, 2**40)) + SPARE,
    "text in an array": head(pairs=1) + pair("a", 9, array(8, 1, struct.pack("<Q", 2**63))) + SPARE,
    "array of unknown": head(pairs=1) + pair("a", 9, array(13, 1)) + SPARE,
    "nesting": head(pairs=1) + pair("a", 9, NESTED) + SPARE,
    "mixed nesting": head(pairs=1)
    + pair("a", 9, array(9, 2, array(0, 1, b"\1") + array(1, 1, b"\1")))
    + SPARE,
    "alignment 0": head(pairs=1) + pair("general.alignment", 4, struct.pack("<I", 0)) + SPARE,
    "alignment 24": head(pairs=1) + pair("general.alignment", 4, struct.pack("<I", 24)) + SPARE,
    "huge alignment": head(pairs=1) + pair("general.alignment", 4, b"\0\0\0\x80") + SPARE,
    "alignment a text": head(pairs=1) + pair("general.alignment", 8, text("32")) + SPARE,
    "split": head(pairs=1) + pair("split.count", 2, struct.pack("<H", 3)) + SPARE,
    "tensor name": head(tensors=1) + info("") + SPARE,
    "long tensor name": head(tensors=1) + info("t" * 300) + SPARE,
    "double tensor": head(tensors=2) + info(offset=0) + info(offset=32) + SPARE,
    "no dimensions": head(tensors=1) + info(shape=()) + SPARE,
    "many dimensions": head(tensors=1) + info(shape=(1,) * 5) + SPARE,
    "huge dimensions": head(tensors=1) + info(dims=2**32 - 1) + SPARE,
    "zero size": head(tensors=1) + info(shape=(0, 8)) + SPARE,
    "overflow": head(tensors=1) + info(shape=(2**32, 2**32)) + SPARE,
    "overflow to little": head(tensors=1) + info(shape=(2**63, 2, 1, 1)) + SPARE,
    "tensor type": head(tensors=1) + info(code=4) + SPARE,
    "rows of odd length": head(tensors=1) + info(shape=(33,), code=8) + SPARE,
    "offset unaligned": head(tensors=1) + info(offset=4) + SPARE,
    "offset past the end": head(tensors=1) + info(offset=2**20) + SPARE,
    "offset near 2^64": head(tensors=1) + info(offset=2**64 - 32) + SPARE,
    "data past the end": head(tensors=1) + info(shape=(2000,)) + SPARE,
    "overlap": head(tensors=2) + info("a", (16,)) + info("b", offset=32) + SPARE,
}  # fmt: skip


@pytest.mark.parametrize("data", LIES.values(), ids=LIES.keys())
def test_a_lying_file_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FileError) as error:
        open_gguf(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_truncation_and_mutation_give_only_our_error(written, tmp_path):
    whole = written.read_bytes()
    data_end = len(whole) - 24  # the padding after the last tensor may be missing
    path = tmp_path / "t.gguf"
    for size in range(data_end):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            open_gguf(path)
    dice, faults = random.Random(0), []
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            broken[dice.randrange(len(broken) if dice.random() < 0.3 else 300)] = dice.choice(
                (0, 1, 9, 127, 255, dice.randrange(256))
            )
        path.write_bytes(broken)
        try:
            file = open_gguf(path)
            for name in file.names:
                file[name].sum()
        except FileError as error:
            faults.append(str(error))
    assert len(faults) > 100
    assert not any("\n" in fault for fault in faults)
