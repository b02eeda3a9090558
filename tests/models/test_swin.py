"""Swin against transformers, and against what the paper says where transformers stops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file
from tests.models.image_oracle import (
    CHECKS,
    ImageCase,
    check_a_fresh_model_loads_there,
    hidden,
    ours,
)

import polyhead as ph
from polyhead.errors import ConfigError

TINY = dict(
    image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
)


def swin(name: str, images: tuple[int, ...] = (2, 3, 32, 32), **options: object) -> ImageCase:
    named = {i: f"kind {i}" for i in range(5)}
    kind = tr.SwinForImageClassification
    return ImageCase(f"swin-{name}", kind, {**TINY, "id2label": named, **options}, images)


def bare(case: ImageCase) -> ImageCase:
    return ImageCase(f"{case.name}-bare", tr.SwinModel, case.options, case.images, hidden)


CASES = [
    swin("plain"),
    swin("three-stages", depths=[1, 2, 3], num_heads=[1, 2, 4], qkv_bias=False),
    swin("window-3", window_size=3),
    swin("window-5-padded", (1, 3, 30, 30), image_size=30, window_size=5),
    swin("window-7", (2, 3, 56, 56), image_size=56, window_size=7, depths=[3, 1]),
    swin("window-is-grid", (2, 3, 16, 16), image_size=16, window_size=8, depths=[2]),
    swin("not-square", (2, 3, 48, 24), image_size=[48, 24]),
    swin("odd", (2, 3, 37, 27)),
    swin("odd-patches", (2, 3, 33, 41), patch_size=[3, 2], window_size=2),
    swin("positions", use_absolute_embeddings=True),
    swin("positions-wide", (2, 3, 24, 40), image_size=[24, 40], use_absolute_embeddings=True),
    swin("gray", (3, 1, 32, 32), num_channels=1, hidden_act="relu", mlp_ratio=2.5),
    swin("eps", layer_norm_eps=0.1, hidden_act="gelu_new", depths=[2, 1], embed_dim=12),
    swin("even-window-2", window_size=2, depths=[4, 2], drop_path_rate=0.3),
    bare(swin("plain")),
    bare(swin("odd", (1, 3, 45, 31), depths=[2, 3, 1], num_heads=[2, 2, 8])),
]
for _case in CASES:  # a stage of every one has a layer, and heads of its own
    _case.options["num_heads"] = _case.options["num_heads"][: len(_case.options["depths"])]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_parity(case: ImageCase, check: Callable[[ImageCase, Path], None], tmp_path: Path) -> None:
    check(case, tmp_path)


FRESH = dict(
    image_size=32, patch_size=2, d_model=8, depths=(2, 2), num_heads=(2, 4), window=4, labels="abc"
)
FRESH["labels"] = ("a", "b", "c")


@pytest.mark.parametrize("case", [swin("fresh", (2, 3, 30, 34)), bare(swin("fresh"))])
def test_a_fresh_model_loads_there(case: ImageCase, tmp_path: Path) -> None:
    head = "none" if case.model_class is tr.SwinModel else "classify"
    check_a_fresh_model_loads_there(case, tmp_path, **FRESH, head=head)


def test_the_index_of_older_files_is_dropped(tmp_path: Path) -> None:
    case = swin("plain")
    case.make().save_pretrained(tmp_path)
    expected = ours(case, ph.load(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in list(tensors):
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            tensors[index] = torch.zeros(16, 16, dtype=torch.long)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(ours(case, ph.load(tmp_path)), expected)


def test_a_model_takes_images_of_several_sizes(tmp_path: Path) -> None:
    """Theirs keeps the window it had to clamp; ours has no memory."""
    case = swin("plain")
    case.make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    first = ours(case, model)
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8))
    assert torch.equal(ours(case, model), first)


def test_a_grid_smaller_than_the_window_reads_the_middle_of_the_table() -> None:
    """Offsets mean the same whatever the window: the table's centre serves a smaller one."""
    large = ph.build("swin", seed=0, **{**FRESH, "window": 8, "depths": (1,), "num_heads": (2,)})
    small = ph.build("swin", seed=0, **{**FRESH, "window": 4, "depths": (1,), "num_heads": (2,)})
    state = large.state_dict()
    table = "backbone.stages.0.layers.0.bias.table"
    state[table] = state[table].view(15, 15, 2)[4:11, 4:11].reshape(49, 2)
    small.load_state_dict(state)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = large.eval()(pixels) - small.eval()(pixels)
    assert found.abs().max() <= 1e-6


def test_paths_are_dropped_while_training_alone() -> None:
    model = ph.build("swin", seed=0, path_dropout=0.9, **FRESH)
    pixels = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(pixels), model(pixels))
    assert torch.equal(model.eval()(pixels), model(pixels))


def test_every_weight_learns_but_none_is_missed() -> None:
    model = ph.build("swin", seed=0, **{**FRESH, "window": 3}, path_dropout=0.0).train()
    model(torch.randn(2, 3, 31, 29)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(num_heads=(2,)), "(2,)"),
        (dict(num_heads=(3, 4)), "3 heads"),
        (dict(depths=(2, -1)), "-1"),
        (dict(window=0), "window"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ph.build("swin", **{**FRESH, **fields})
    assert says in str(caught.value)


def test_positions_of_another_grid_are_refused() -> None:
    model = ph.build("swin", has_positions=True, seed=0, **FRESH)
    with pytest.raises(ValueError, match="8 x 16 patches"):
        model(torch.zeros(1, 3, 16, 32))
