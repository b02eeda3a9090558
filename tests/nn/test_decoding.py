"""A decode step has fixed shapes: it compiles once, whole, and says what the eager step says."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import polyhead as ph

SIZES = dict(vocab_size=23, d_model=16, d_ff=24, num_layers=2, num_heads=4, max_seq_len=32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", dict(num_kv_heads=2)),
    "experts": ("mixtral", dict(num_experts=4, top_k=2)),
    # One layer rolls over its last four positions, the other keeps them all.
    "windows": (
        "qwen2",
        dict(num_kv_heads=2, use_window=True, window=4, max_window_layers=1),
    ),
}


@pytest.fixture
def strict() -> Iterator[None]:
    """Recompiling is an error here."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_compile_once_and_equal_the_eager_ones(name: str, strict: None) -> None:
    family, options = MODELS[name]
    model = ph.build(family, seed=1, **SIZES, **options).eval()
    prompts = torch.randint(0, 23, (2, 7))
    kept = torch.arange(7) < torch.tensor([[7], [3]])
    caches = [model.backbone.make_caches(2, max_len=24) for _ in range(2)]
    for cache in caches:
        model(prompts, kept, caches=cache)
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    step = torch.compile(model, backend=counting, fullgraph=True, dynamic=False)
    for token in torch.randint(0, 23, (9, 2, 1)):
        assert_close(step(token, caches=caches[0]), model(token, caches=caches[1]))
    assert len(graphs) == 1
    assert torch.equal(caches[0].lengths, caches[1].lengths)

    caches[0].sync()
    assert caches[0].lengths.tolist() == [16, 12]
    if name == "windows":
        with pytest.raises(ValueError, match="rolling cache"):
            caches[0].truncate([9, 9])
        return
    for cache in caches:
        cache.truncate([9, 9])
    token = torch.randint(0, 23, (2, 1))
    assert_close(step(token, caches=caches[0]), model(token, caches=caches[1]))
    assert len(graphs) == 1


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"
)
@torch.no_grad()
def test_the_default_compiler_agrees(strict: None) -> None:
    model = ph.build("llama", seed=2, **{**SIZES, "num_layers": 1}, num_kv_heads=2).eval()
    caches = [model.backbone.make_caches(2, max_len=16) for _ in range(2)]
    step = torch.compile(model, fullgraph=True, dynamic=False)
    for token in torch.randint(0, 23, (4, 2, 1)):
        assert_close(step(token, caches=caches[0]), model(token, caches=caches[1]))


@torch.no_grad()
def test_eager_steps_over_growing_caches_equal_one_forward() -> None:
    model = ph.build("llama", seed=2, **SIZES).eval()
    caches = model.backbone.make_caches(1)
    ids = torch.randint(0, 23, (1, 6))
    pieces = [model(piece, caches=caches) for piece in ids.split((3, 1, 2), 1)]
    assert_close(torch.cat(pieces, 1), model(ids))


@torch.no_grad()
def test_a_user_s_mask_keeps_its_heads_and_rows_over_a_cache() -> None:
    model = ph.build("llama", seed=3, **SIZES).eval()
    ids = torch.randint(0, 23, (2, 6))

    def odd(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q + k + h + b) % 2 == 0) | (q == k)

    mask = ph.Mask(allow=(odd,), heads=4, rows=2)
    for max_len in (None, 16):
        caches = model.backbone.make_caches(2, max_len)
        pieces = [model(piece, mask, caches=caches) for piece in ids.split((3, 1, 2), 1)]
        assert_close(torch.cat(pieces, 1), model(ids, mask))
    with pytest.raises(ValueError, match="segments"):
        model(ids, ph.Mask(segments=torch.zeros_like(ids)), caches=model.backbone.make_caches(2))


@torch.no_grad()
def test_packed_texts_equal_each_alone() -> None:
    for family in ("gpt2", "llama"):
        model = ph.build(family, seed=4, **SIZES).eval()
        texts = [torch.randint(0, 23, (1, n)) for n in (4, 1, 6)]
        segments = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)], 1)
        at = torch.cat([torch.arange(text.shape[1])[None] for text in texts], 1)
        packed = model(torch.cat(texts, 1), ph.Mask(segments=segments), position_ids=at)
        assert_close(packed, torch.cat([model(text) for text in texts], 1))
