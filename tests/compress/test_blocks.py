"""A GGUF file's blocks as weights: the numbers of the file, unpacked or not, in every family."""

from itertools import cycle
from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.adapt.base import base_digest
from polyhead.compress.blocks import FAST, Blocks
from polyhead.compress.formats import Int4, Int8, PackedWeight
from polyhead.compress.quantize import weight_bytes
from polyhead.errors import ConfigError, FileError
from polyhead.files.gguf import open_gguf
from polyhead.files.gguf_blocks import BY_NAME, DEQUANTIZERS
from polyhead.files.gguf_types import RawTensor
from polyhead.files.gguf_write import write_gguf
from polyhead.models import gguf as names

SIZES = dict(vocab_size=48, d_model=256, d_ff=256, num_layers=2, num_heads=8, max_seq_len=32)
GROUPED = dict(**SIZES, num_kv_heads=4)
EXPERTS = dict(num_experts=3, top_k=2)
MODELS = {
    "llama": ("llama", GROUPED),
    "llama tied": ("llama", dict(**GROUPED, tie_embeddings=True)),
    "mistral": ("mistral", dict(**GROUPED, window=6)),
    "mixtral": ("mixtral", dict(**GROUPED, **EXPERTS)),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "qwen2moe": (
        "qwen2_moe",
        dict(**GROUPED, **EXPERTS, d_expert=256, shared_d_ff=256, qkv_bias=True),
    ),
    "qwen3moe": ("qwen3_moe", dict(**GROUPED, **EXPERTS, d_expert=256, renormalize=True)),
    "olmoe": ("olmoe", dict(**GROUPED, **EXPERTS)),
    "gpt2": ("gpt2", SIZES),
}
FLOATS = ("gate_inp.weight", "position_embd.weight")  # which llama.cpp leaves as they are
PLAIN = {"router", "shared_gate", "positions", "q_norm", "k_norm"}
IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 8, 40]])
# Where the float16 numbers of a block stand, that random bytes may not be.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(kind: str, shape: tuple[int, ...]) -> RawTensor:
    """Any codes, with scales that keep weights small."""
    row = BY_NAME[kind]
    data = torch.randint(256, (*shape[:-1], shape[-1] // row.weights, row.size), dtype=torch.uint8)
    for at in HALVES.get(kind, (0,)):
        halves = (torch.randn(data.shape[:-1]) * (1e-5 if kind.endswith("K") else 3e-3)).half()
        data[..., at : at + 2] = halves[..., None].view(torch.uint8)
    return RawTensor(kind, shape, data.flatten(-2))


def write_blocks(path: Path, name: str, kinds: tuple[str, ...]) -> Path:
    """A tiny model whose matrices are random blocks of these kinds by turns."""
    family, sizes = MODELS[name]
    model = ph.build(family, seed=0, **sizes)
    plain = path.with_suffix(".plain")
    names.write(plain, model.hf_config(), model.hf_tensors())
    file, turn = open_gguf(plain), cycle(kinds)
    torch.manual_seed(0)
    tensors = {each: file.tensor(each) for each in file.names}
    for each, tensor in tensors.items():
        if tensor.ndim > 1 and not each.endswith(FLOATS):
            tensors[each] = random_blocks(next(turn), tuple(tensor.shape))
    write_gguf(path, file.typed_metadata(), tensors)
    return path


def same(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def packed_parts(model) -> list[PackedWeight]:
    return [part for part in model.modules() if isinstance(part, PackedWeight)]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_stay_and_unpack_to_what_a_plain_load_gives(name, tmp_path):
    path = write_blocks(tmp_path / "m.gguf", name, tuple(DEQUANTIZERS))
    plain, packed = ph.load(path), ph.load(path, packed=True)
    assert same(packed.state_dict(), plain.state_dict())
    assert torch.equal(packed(IDS), plain(IDS))
    matrices = [n for n, p in plain.named_parameters() if p.ndim > 1]
    left = [n for n, p in packed.named_parameters() if p.ndim > 1]
    assert {n.split(".")[-2] for n in left} <= PLAIN
    assert len(packed_parts(packed)) == len(matrices) - len(left) > 8
    assert base_digest(packed) == base_digest(plain)
    assert weight_bytes(packed) < weight_bytes(plain) / 3
    half = ph.load(path, "bfloat16", packed=True)
    assert same(half.state_dict(), ph.load(path, "bfloat16").state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_go_from_file_to_file_as_they_are(name, tmp_path):
    path = write_blocks(tmp_path / "m.gguf", name, ("Q6_K", "Q4_0", "Q6_K"))
    config, tensors, file = names.read(path)
    names.write(tmp_path / "n.gguf", config, tensors, file.typed_metadata())
    again = open_gguf(tmp_path / "n.gguf")
    assert again.names == file.names
    assert again.metadata["general.file_type"] == 18  # llama.cpp's number of mostly Q6_K
    for each in file.names:
        assert again.type_of(each) == file.type_of(each)
        assert torch.equal(again.raw(each), file.raw(each)), each


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_four_and_eight_bits_lie_as_the_kernels_want_them(kind, tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "llama", (kind,))
    form = {"Q4_0": Int4, "Q4_1": Int4, "Q8_0": Int8}.get(kind, Blocks)
    parts = packed_parts(ph.load(path, packed=True))
    assert {type(part) for part in parts} == {form}
    assert (kind in FAST) == (form is not Blocks)
    # A half more a block for what Q4_0 says without a number.
    size = BY_NAME[kind].size + 2 * (kind == "Q4_0")
    assert parts[0].num_bytes() * BY_NAME[kind].weights == parts[0].num_weights * size


@pytest.mark.parametrize("name", ["llama tied", "qwen3moe", "gpt2"])
def test_packed_for_the_cpu_they_answer_alike(name, tmp_path):
    path = write_blocks(tmp_path / "m.gguf", name, FAST)
    plain, fast = ph.load(path), ph.pack(ph.load(path, packed=FAST))
    assert same(fast.state_dict(), plain.state_dict())
    wanted, found = plain(IDS), fast(IDS)
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_scales_that_four_bits_cannot_hold_stay_in_their_blocks(tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "llama", ("Q4_0",))
    file = open_gguf(path)
    tensors = {name: file.stored(name) for name in file.names}
    name = "blk.0.ffn_up.weight"
    tensors[name].data[3, :2] = torch.tensor([9000.0]).half().view(torch.uint8)
    write_gguf(tmp_path / "n.gguf", file.typed_metadata(), tensors)
    packed = ph.load(tmp_path / "n.gguf", packed=True)
    assert isinstance(packed.backbone.layers[0].ffn.up.packed, Blocks)
    assert same(packed.state_dict(), ph.load(tmp_path / "n.gguf").state_dict())


def test_kinds_that_are_not_named_are_unpacked(tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "mixtral", ("Q4_0", "Q6_K"))
    model = ph.load(path, packed="Q6_K")
    assert {part.kind for part in packed_parts(model)} == {"Q6_K"}
    assert same(model.state_dict(), ph.load(path).state_dict())
    assert not packed_parts(ph.load(path, packed=()))


def test_a_head_of_ones_own_goes_on_blocks(tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "llama", FAST)
    model = ph.load(path, head="classify", labels=["no", "yes"], packed=True)
    assert model(IDS).shape == (1, 2)
    bare = ph.load(path, head="none", packed=True)
    assert torch.equal(bare(IDS), ph.load(path, head="none")(IDS))


def test_an_adapter_goes_on_blocks(tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "llama tied", (*FAST, "Q6_K"))
    plain = ph.load(path)
    ph.add_adapter(plain)
    for name, parameter in plain.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    ph.save_adapter(plain, tmp_path / "adapter")
    packed = ph.load(path, adapter=tmp_path / "adapter", packed=True)
    assert packed_parts(packed)
    assert torch.allclose(packed(IDS), plain(IDS), atol=1e-4)
    assert (ph.pack(packed)(IDS) - plain(IDS)).norm() < 0.05 * plain(IDS).norm()


def test_what_has_no_such_blocks_is_refused_in_one_line(tmp_path):
    path = write_blocks(tmp_path / "m.gguf", "llama", ("Q8_0",))
    ph.load(path).save(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"hf is no GGUF file, so it has no blocks to keep"):
        ph.load(tmp_path / "hf", packed=True)
    with pytest.raises(ConfigError, match="packed names 'Q3': choose of Q4_0,"):
        ph.load(path, packed="Q3")
    file = open_gguf(path)
    tensors = {name: file.stored(name) for name in file.names}
    name = "blk.1.attn_q.weight"
    tensors[name] = random_blocks("IQ4_NL", file.shape(name))
    write_gguf(tmp_path / "n.gguf", file.typed_metadata(), tensors)
    for packed in (False, True):
        with pytest.raises(FileError, match=r"n\.gguf: tensor 'blk\.1\.attn_q\.weight': IQ4_NL"):
            ph.load(tmp_path / "n.gguf", packed=packed)
