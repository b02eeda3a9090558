"""Matrices in few bits: as near as the format allows, in the memory that it says."""

import math

import pytest
import torch

import polyhead as ph
from polyhead.compress import layers
from polyhead.compress.formats import (
    FORMATS,
    BrainHalf,
    Half,
    Int4,
    Int8,
    Int8Rows,
    Nf4,
    Nf6,
    normal_float,
)
from polyhead.compress.quantize import weight_bytes
from polyhead.errors import ConfigError
from polyhead.train import objectives
from polyhead.train.objectives import head_cross_entropy

IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 8]])
SIZES = dict(d_model=64, num_layers=2, num_heads=4, max_seq_len=32)
MODELS = {
    "llama": dict(**SIZES, vocab_size=70, d_ff=96, num_kv_heads=2),
    "llama-tied": dict(**SIZES, vocab_size=70, d_ff=96, tie_embeddings=True),
    "gpt2": dict(**SIZES, vocab_size=70),
    "mixtral": dict(**SIZES, vocab_size=70, d_ff=48, num_experts=4, top_k=2),
    "bert": dict(**SIZES, vocab_size=70, d_ff=96),
    "albert": dict(**SIZES, vocab_size=70, d_ff=96, embedding_width=32),
    "deberta-v2": dict(**SIZES, vocab_size=70, d_ff=96, position_buckets=8),
    "t5": dict(d_model=64, num_layers=2, num_heads=4, vocab_size=70, d_ff=96),
    "odd": dict(vocab_size=67, d_model=36, num_layers=2, num_heads=3, d_ff=50, max_seq_len=32),
}


def made(name):
    family = {"llama-tied": "llama", "odd": "gpt2"}.get(name, name)
    return ph.build(family, seed=0, **MODELS[name]).eval()


def answer(model, **named):
    given = (IDS, IDS[:, :4]) if model.config.model_type == "t5" else (IDS,)
    return model(*given, **named)


def matrices(model):
    return {n: p for n, p in model.state_dict().items() if p.ndim >= 2 and p.numel() > 1000}


def test_levels_are_the_papers():
    """Table of QLoRA's appendix E."""
    stated = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert torch.allclose(normal_float(), torch.tensor(stated), atol=1e-6)
    assert len(set(normal_float(6).tolist())) == 64


# The error that a format leaves in normal weights, as a share of their length.
ERRORS = {
    "int4": (Int4, 0.06, 0.09),
    "nf4": (Nf4, 0.085, 0.1),
    "nf6": (Nf6, 0.02, 0.032),
    "int8": (Int8, 0.003, 0.009),
    "int8-rows": (Int8Rows, 0.004, 0.012),
    "fp16": (Half, 0.0001, 0.0005),
    "bf16": (BrainHalf, 0.001, 0.004),
}


@pytest.mark.parametrize(("form", "low", "high"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("shape", [(7, 64), (33, 100), (300, 320), (1, 5)])
def test_a_matrix_comes_back(form, low, high, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    packed = form(weight)
    error = (packed.unpack() - weight).norm() / weight.norm()
    assert error < high
    assert error > low or weight.numel() < 1000
    rows = torch.randint(shape[0], (5,))
    assert torch.equal(packed.unpack(rows), packed.unpack()[rows])
    some = slice(shape[0] // 2, shape[0])
    assert torch.equal(packed.unpack(some), packed.unpack()[some])
    half = packed.to(torch.bfloat16)
    assert half.unpack().dtype == torch.bfloat16
    assert torch.equal(half.float().unpack(), form(weight).unpack())


@pytest.mark.parametrize("form", FORMATS.values())
def test_nothing_but_zeros_stays_so(form):
    assert torch.equal(form(torch.zeros(3, 70)).unpack(), torch.zeros(3, 70))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_is_the_one_that_it_saves_as(tmp_path, name, form):
    """The product in few bits is the product of what unpacks, in every family."""
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    packed = ph.quantize(model, form)
    packed.save(tmp_path / "floats", floats=True)
    floats = ph.load(tmp_path / "floats", head=model.head_kind)
    assert torch.allclose(answer(packed), answer(floats), atol=1e-5)
    assert not torch.equal(answer(packed), answer(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert packed.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "t5"])
def test_memory_is_what_the_format_says(name):
    model = made(name)
    packed = ph.quantize(model, "nf4", embeddings="nf4")
    few = sum(value.numel() for value in matrices(model).values())
    rest = model.num_parameters() - few
    assert weight_bytes(packed) <= 0.56 * few + 4.5 * rest + 2000
    assert weight_bytes(ph.quantize(model, "int8")) < 0.4 * weight_bytes(model)


def test_a_model_of_usual_width_takes_six_tenths_of_a_byte_a_weight():
    model = ph.build(
        "llama", vocab_size=2000, d_model=256, d_ff=768, num_layers=2, num_heads=4,
        tie_embeddings=True,
    ).bfloat16()  # fmt: skip
    assert weight_bytes(model) / model.num_parameters() == 2.0
    assert weight_bytes(ph.quantize(model)) / model.num_parameters() < 0.6


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_to_an_adapter(name, dtype):
    packed = ph.quantize(made(name).to(dtype), "nf4")
    ph.add_adapter(packed, ph.LoraConfig(rank=2, targets="all-linear"))
    before = answer(packed)
    loss = before.float().square().mean()
    loss.backward()
    learning = {n: p for n, p in packed.named_parameters() if p.requires_grad}
    assert learning
    assert all("adapters" in n for n in learning)
    assert all(p.grad is not None for n, p in learning.items() if n.endswith(".b"))
    with torch.no_grad():
        for n, p in learning.items():
            if n.endswith(".b"):
                p -= 0.02 * p.grad / (p.grad.norm() + 1e-9)
    assert answer(packed).float().square().mean() < loss


def test_gradients_are_those_of_the_unpacked_model(tmp_path):
    packed = ph.quantize(made("llama"), "nf4")
    packed.save(tmp_path, floats=True)
    floats = ph.load(tmp_path)
    grads = []
    for model in (packed, floats):
        torch.manual_seed(3)
        ph.add_adapter(model, ph.LoraConfig(rank=2))
        answer(model).float().logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][n], atol=1e-5), n


def test_an_adapter_of_a_packed_base_fits_the_base(tmp_path):
    model = made("llama")
    model.save(tmp_path / "base")
    packed = ph.quantize(ph.load(tmp_path / "base"))
    ph.add_adapter(packed)
    ph.save_adapter(packed, tmp_path / "adapter")
    ph.load_adapter(model, tmp_path / "adapter")
    again = ph.load(tmp_path / "adapter", change=ph.quantize)
    assert torch.equal(answer(again), answer(packed))
    with pytest.raises(ConfigError, match="kept in few bits"):
        ph.merge_adapters(packed)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda m: ph.quantize(m, "int3"),
            "form is 'int3': choose one of nf4, nf6, int4, int8, int8-rows, fp16, bf16",
        ),
        (lambda m: ph.quantize(m, "none"), "form is 'none'"),
        (lambda m: ph.quantize(m, embeddings="fp8"), "form is 'fp8'"),
        (lambda m: ph.quantize(ph.quantize(m)), "few bits already"),
        (lambda m: (ph.add_adapter(m), ph.quantize(m)), "has adapters"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make(made("llama"))


def test_generation_from_few_bits():
    packed = ph.quantize(made("llama-tied"), "int8", embeddings="none")
    assert math.isfinite(float(packed(IDS).sum()))
    ids = IDS
    for _ in range(3):
        ids = torch.cat([ids, packed(ids)[:, -1:].argmax(-1)], 1)
    assert ids.shape == (1, 10)


@pytest.mark.parametrize("form", FORMATS)
def test_a_large_matrix_is_never_whole(form, monkeypatch):
    """Products by stretches are those of the whole, both ways, and in a head's loss too."""
    model = ph.quantize(made("llama-tied"), form)
    labels = IDS.roll(-1, 1)
    hidden = torch.randn(1, 7, 64, requires_grad=True)

    def found():
        hidden.grad = None
        losses = [
            head_cross_entropy(model.head, hidden, labels),
            model.head(hidden).logsumexp(-1).sum(),
        ]
        sum(losses).backward()
        return *(loss.detach() for loss in losses), hidden.grad.clone()

    whole, sizes = found(), []
    monkeypatch.setattr(layers, "_AT_ONCE", 64 * 9)
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", 70 * 3)
    of_head = type(model.backbone.embedding.packed)
    unpack = of_head.unpack

    def counted(self, rows=slice(None)):
        sizes.append(len(found := unpack(self, rows)))
        return found

    monkeypatch.setattr(of_head, "unpack", counted)
    for a, b in zip(found(), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert 0 < max(sizes) <= 9
