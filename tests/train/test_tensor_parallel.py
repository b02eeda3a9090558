"""Ranks that hold layers together answer and learn as one does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.train.launching import LLAMA, SIZES, assert_near, launch, run, run_all

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.train.plans import tensor_parallel

S = dict(vocab_size=50, d_model=32, num_layers=2, num_heads=4)
WIDE = {**S, "d_ff": 48}
FAMILIES = {
    "gpt2": {**S, "max_seq_len": 64},
    "llama": {**WIDE, "num_kv_heads": 2, "tie_embeddings": True},
    "qwen2": {**WIDE, "num_kv_heads": 2},
    "qwen3": {**WIDE, "num_kv_heads": 2},
    "olmoe": {**WIDE, "num_experts": 4},
    "qwen2_moe": {**WIDE, "num_experts": 4},
    "bert": WIDE,
    "albert": {**WIDE, "embedding_width": 16},
    "t5": {**WIDE, "head_dim": 8},
    "transformer": {**WIDE, "position": "alibi", "kind": "decoder"},
}
TWO = {"family": "llama", "sizes": {**LLAMA["sizes"], "tie_embeddings": True}}
RUNS = {
    "llama": (TWO, {"recompute": "blocks"}),
    "gpt2": ({"sizes": SIZES}, {"ema": 0.9, "clip": 0.01}),
    "mixtral": ({"family": "mixtral", "sizes": {**LLAMA["sizes"], "num_experts": 4}}, {}),
}


def told(folder: Path, name: str, **more):
    job, settings = RUNS[name]
    return {**job, "config": {**settings, "tensor": 2, "out": str(folder / name), **more}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left their runs, after they answered as one for every family."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [told(folder, name) for name in RUNS]
    cut = told(folder, "llama", steps=3, out=str(folder / "cut"))
    launch(2, [*jobs, cut], "test_tensor_parallel:answer_and_run")
    return folder


def answer_and_run() -> None:
    """What each of the two does."""
    dist.init_process_group("gloo")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for family, sizes in FAMILIES.items():
        assert_same_answers(family, sizes, mesh)
    assert_same_text(mesh)
    run_all()


def assert_same_answers(family: str, sizes, mesh) -> None:
    """Logits, and the gradients of all weights."""
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    given = (ids, ids[:, :5]) if family == "t5" else (ids,)
    whole, dealt = (ph.build(family, seed=0, **sizes).eval() for _ in range(2))
    tensor_parallel(dealt, mesh)
    assert any(hasattr(p, "full_tensor") for p in dealt.parameters())
    expected, found = whole(*given), dealt(*given)
    assert (expected - found).abs().max() <= 1e-5, family
    for logits in (expected, found):
        logits.square().mean().backward()
    for (name, a), b in zip(whole.named_parameters(), dealt.parameters(), strict=True):
        grad = b.grad if not hasattr(b.grad, "full_tensor") else b.grad.full_tensor()
        assert (a.grad is None) == (grad is None), (family, name)
        assert grad is None or torch.allclose(a.grad, grad, rtol=1e-4, atol=1e-6), (family, name)


def assert_same_text(mesh) -> None:
    """Written with caches, which hold the heads of this rank."""
    tokenizer = ph.Tokenizer.train(["the cat sat on a mat"], kind="chars")
    sizes = {**FAMILIES["qwen3"], "vocab_size": tokenizer.vocab_size}
    whole, dealt = (ph.build("qwen3", seed=0, **sizes).eval() for _ in range(2))
    tensor_parallel(dealt, mesh)
    settings = ph.GenerationConfig(max_new_tokens=12, temperature=0, ignore_eos=True)
    texts = [
        ph.TextGenerator(model, tokenizer).generate(["the cat", "a"], settings)
        for model in (whole, dealt)
    ]
    assert [list(t.token_ids) for t in texts[0]] == [list(t.token_ids) for t in texts[1]]


@pytest.fixture(scope="module")
def four(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two groups of two left a run, and went on with one of two ranks."""
    folder = tmp_path_factory.mktemp("four")
    cut = told(two, "llama", steps=5, out=str(two / "cut")) | {"resume": True, "seed": 1}
    launch(4, [told(folder, "llama"), cut])
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_run_of_one(two, tmp_path, name):
    run(told(tmp_path, name, tensor=1))
    assert_near(tmp_path / name, two / name)


def test_groups_share_the_data(four, tmp_path):
    run(told(tmp_path, "llama", tensor=1))
    assert_near(tmp_path / "llama", four / "llama")


def test_a_run_goes_on_in_other_groups(two, four, tmp_path):
    """Two ranks, then two groups of two, then one rank."""
    run(told(two, "llama", tensor=1, out=str(two / "cut")) | {"resume": True, "seed": 2})
    run(told(tmp_path, "llama", tensor=1))
    assert_near(tmp_path / "llama", two / "cut")


class Mesh:
    """Of two ranks that nobody asks."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


@pytest.mark.parametrize(
    ("family", "fields", "ranks", "says"),
    [
        ("llama", {"num_kv_heads": 2}, 4, "layers.0.attention: num_kv_heads is 2, which 4 ranks"),
        ("llama", {"num_heads": 4, "d_ff": 46}, 4, "layers.0.ffn: d_ff is 46, which 4 ranks"),
        ("deberta-v2", {}, 2, r"no plan for backbone.*\(Disentangled.*use fsdp alone"),
        ("transformer", {"position": "shaw"}, 2, r"no plan for .*\(Shaw\)"),
    ],
)
def test_what_cannot_be_dealt_out_is_one_line(family, fields, ranks, says):
    model = ph.build(family, **{**WIDE, **fields})
    with pytest.raises(ConfigError, match=says) as error:
        tensor_parallel(model, Mesh(ranks))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_adapters_are_refused():
    model = ph.build("llama", **WIDE)
    ph.add_adapter(model, ph.LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"no plan for .*attention.q \(AdaptedLinear\)"):
        tensor_parallel(model, Mesh(2))  # pyright: ignore[reportArgumentType]
