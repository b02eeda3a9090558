"""ViT, DeiT and DINOv2 against transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tr
from tests.models.image_oracle import (
    CHECKS,
    ImageCase,
    check_a_fresh_model_loads_there,
    hidden,
    ours,
)

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.models.config_json import from_hf
from polyhead.models.registry import family_of

TINY = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    image_size=16,
    patch_size=4,
)
DINO = {name: value for name, value in TINY.items() if name != "intermediate_size"}


def labels(number: int) -> dict[str, dict[int, str]]:
    return {"id2label": {i: f"kind {i}" for i in range(number)}}


def vit(name: str, images: tuple[int, ...] = (2, 3, 16, 16), **options: object) -> ImageCase:
    return ImageCase(
        f"vit-{name}", tr.ViTForImageClassification, {**TINY, **labels(5), **options}, images
    )


def deit(name: str, images: tuple[int, ...] = (2, 3, 16, 16), **options: object) -> ImageCase:
    kind = tr.DeiTForImageClassificationWithTeacher
    return ImageCase(f"deit-{name}", kind, {**TINY, **labels(4), **options}, images)


def dino(name: str, images: tuple[int, ...] = (2, 3, 16, 16), **options: object) -> ImageCase:
    kind = tr.Dinov2ForImageClassification
    return ImageCase(f"dinov2-{name}", kind, {**DINO, **labels(3), **options}, images)


def bare(case: ImageCase, kind: type) -> ImageCase:
    return ImageCase(f"{case.name}-bare", kind, case.options, case.images, hidden)


CASES = [
    vit("plain"),
    vit("no-bias", qkv_bias=False),
    vit("gray", (3, 1, 16, 16), num_channels=1, layer_norm_eps=1e-6),
    vit("odd", (1, 3, 19, 19), image_size=19),
    vit("tall", (2, 3, 24, 12), image_size=[24, 12]),
    vit("flat-patches", (2, 3, 16, 24), image_size=[16, 24], patch_size=[8, 4]),
    vit("tanh-gelu", hidden_act="gelu_new", num_attention_heads=1),
    vit("relu", hidden_act="relu", num_hidden_layers=1, layer_norm_eps=1e-3),
    vit("large-eps-one-patch", (2, 3, 16, 16), patch_size=16, layer_norm_eps=0.1),
    bare(vit("pooler"), tr.ViTModel),
    bare(vit("pooler", pooler_output_size=7, pooler_act="relu", qkv_bias=False), tr.ViTModel),
    deit("plain"),
    deit("no-bias", qkv_bias=False),
    deit("gray", (2, 1, 16, 16), num_channels=1),
    deit("odd", (1, 3, 18, 18), image_size=18),
    deit("wide", (2, 3, 8, 20), image_size=[8, 20]),
    deit("silu", hidden_act="silu", layer_norm_eps=1e-5),
    deit("six-heads", num_attention_heads=6, num_hidden_layers=2),
    ImageCase("deit-one-head", tr.DeiTForImageClassification, {**TINY, **labels(2)}),
    ImageCase(
        "deit-one-head-odd",
        tr.DeiTForImageClassification,
        {**TINY, "image_size": 13, "patch_size": 3, "qkv_bias": False},
        (2, 3, 13, 13),
    ),
    bare(deit("pooler"), tr.DeiTModel),
    dino("plain"),
    dino("gated", use_swiglu_ffn=True),
    dino("gated-narrow", use_swiglu_ffn=True, hidden_size=20, num_attention_heads=2, mlp_ratio=3),
    dino("larger", (2, 3, 28, 28)),
    dino("smaller", (2, 3, 8, 8), qkv_bias=False),
    dino("tall", (2, 3, 32, 8)),
    dino("odd-wide", (1, 3, 13, 39), use_mask_token=False),
    dino("nearly-trained", (2, 3, 18, 19), image_size=18),
    dino("gray", (2, 1, 20, 24), num_channels=1, hidden_act="gelu_new", layer_norm_eps=1e-3),
    dino("scaled", layerscale_value=0.1, mlp_ratio=2, drop_path_rate=0.2),
    bare(dino("bare", (2, 3, 24, 16)), tr.Dinov2Model),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_parity(case: ImageCase, check: Callable[[ImageCase, Path], None], tmp_path: Path) -> None:
    check(case, tmp_path)


FRESH = dict(
    d_model=24, num_layers=2, num_heads=2, image_size=16, patch_size=4, labels=("a", "b", "c")
)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        (vit("fresh"), dict(d_ff=32, pooler_width=None)),
        (ImageCase("deit", tr.DeiTForImageClassification), dict(d_ff=32)),
        (deit("fresh"), dict(d_ff=32, head="distilled")),
        (dino("fresh", (2, 3, 24, 16)), dict(is_gated=True)),
        (bare(vit("fresh"), tr.ViTModel), dict(d_ff=32, head="none")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_fresh_model_loads_there(case: ImageCase, fields: dict, tmp_path: Path) -> None:
    check_a_fresh_model_loads_there(case, tmp_path, **FRESH, **fields)


def test_the_pooler_answers_as_theirs(tmp_path: Path) -> None:
    case = bare(vit("pooler", pooler_output_size=7), tr.ViTModel)
    reference = case.make()
    reference.save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    with torch.no_grad():
        expected = reference(case.pixels()).pooler_output
        found = model.pooler(model.backbone(case.pixels()))
    assert (found - expected).abs().max() <= 1e-5


def test_a_model_without_its_pooler_loads(tmp_path: Path) -> None:
    case = bare(vit("plain"), tr.ViTModel)
    reference = tr.ViTModel(tr.ViTConfig(**case.options), add_pooling_layer=False).eval()
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = reference(case.pixels()).last_hidden_state
    assert (ours(case, ph.load(tmp_path)) - expected).abs().max() <= 1e-5


def test_labels_travel(tmp_path: Path) -> None:
    vit("plain").make().save_pretrained(tmp_path)
    assert ph.load(tmp_path).config.labels == tuple(f"kind {i}" for i in range(5))


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (torch.zeros(2, 3, 16, 20), "4 x 5 patches"),
        (torch.zeros(2, 1, 16, 16), "[batch, 3, height, width]"),
        (torch.zeros(3, 16, 16), "[3, 16, 16]"),
        (torch.zeros(2, 3, 2, 16), "2 x 16"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8"),
        ([[1.0]], "list"),
    ],
)
def test_what_is_no_image_for_it_is_refused(pixels: object, says: str) -> None:
    model = ph.build("vit", d_ff=32, seed=0, **FRESH)
    with pytest.raises(ValueError, match=r"pass|resize") as caught:
        model(pixels)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(num_heads=5), "5 heads"),
        (dict(patch_size=20), "20"),
        (dict(image_size=(16, 16, 16)), "(16, 16, 16)"),
        (dict(patch_size=0), "0"),
        (dict(num_channels=0), "num_channels"),
        (dict(image_size=10**9), str(10**9)),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ph.build("vit", **{**FRESH, **fields})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tr.ViTConfig, tr.DeiTConfig, tr.Dinov2Config, tr.SwinConfig])
def test_what_a_file_leaves_out_is_as_theirs(kind: type) -> None:
    """An empty file and one that spells transformers' defaults out say the same."""
    family = family_of(kind.model_type).config
    full = json.loads(kind().to_json_string(use_diff=False))
    for known in ("id2label", "label2id", "pooler_output_size"):
        full.pop(known, None)
    assert from_hf(family, {"model_type": kind.model_type}) == from_hf(family, full)


def test_half_precision_takes_a_processors_floats() -> None:
    model = ph.build("dinov2", seed=0, **FRESH).to(torch.bfloat16).eval()
    assert model(torch.randn(1, 3, 20, 12)).dtype == torch.bfloat16
