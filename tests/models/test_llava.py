"""LLaVA equals transformers, over several towers and decoders; files, caches, batches, text."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polyhead as ph
from polyhead.errors import DataError
from polyhead.models.llava_config import LlavaConfig

transformers = pytest.importorskip("transformers")

CLOSE = 1e-5
IMAGE, SIDE = 55, 12
SIZES = dict(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
TOWER = dict(
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=4,
)


@dataclass(frozen=True)
class Case:
    """The start of two config classes, and what each of three configs says beyond the sizes."""

    name: str
    text: str = "Llama"
    vision: str = "CLIPVision"
    text_options: Mapping[str, Any] = field(default_factory=dict)
    vision_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        text = getattr(transformers, self.text + "Config")(**{**SIZES, **self.text_options})
        tower = {**TOWER, **({} if self.vision == "Dinov2" else {"intermediate_size": 32})}
        vision = getattr(transformers, self.vision + "Config")(**{**tower, **self.vision_options})
        config = transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=IMAGE, **self.options
        )
        torch.manual_seed(1)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return model

    @property
    def num_features(self) -> int:
        """Image tokens an image."""
        patches = (SIDE // self.vision_options.get("patch_size", 4)) ** 2
        extra = 2 if self.vision == "DeiT" else 1
        return patches + extra - (self.options.get("vision_feature_select_strategy") != "full")

    def row(self, *runs: int) -> list[int]:
        """Runs of words with an image between each two."""
        found = torch.randint(3, IMAGE, (runs[0],)).tolist()
        for run in runs[1:]:
            found += [IMAGE] * self.num_features + torch.randint(3, IMAGE, (run,)).tolist()
        return found


FULL = {"vision_feature_select_strategy": "full"}
CASES = [
    Case("llama"),
    Case("llama-last", options={"vision_feature_layer": -1, "projector_hidden_act": "relu"}),
    Case("llama-list-full", options={"vision_feature_layer": [-1, 1, 0], **FULL}),
    Case(
        "llama-no-bias",
        options={"vision_feature_layer": 1, "multimodal_projector_bias": False},
    ),
    Case(
        "llama-biases-tied",
        text_options={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Case(
        "mistral-window-patches",
        "Mistral",
        text_options={"sliding_window": 6},
        vision_options={"patch_size": 6},
    ),
    Case(
        "qwen2-tied",
        "Qwen2",
        text_options={"tie_word_embeddings": True},
        options={"vision_feature_layer": [-2]},
    ),
    Case(
        "qwen3-gelu", "Qwen3", text_options={"head_dim": 8}, vision_options={"hidden_act": "gelu"}
    ),
    Case("mixtral", "Mixtral", text_options={"num_local_experts": 3}),
    Case("vit", vision="ViT", options={"vision_feature_layer": -1}),
    Case("deit-full", "Qwen2", "DeiT", options={"vision_feature_layer": [2, -3], **FULL}),
    Case("dinov2", "Mistral", "Dinov2", options={"projector_hidden_act": "gelu_new"}),
]

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
some = pytest.mark.parametrize(
    "case", [CASES[i] for i in (0, 5, 6, 10)], ids=lambda case: case.name
)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@by_name
@torch.no_grad()
def test_features_hidden_states_and_logits_equal(case: Case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    ours = ph.load(tmp_path)
    pixels = images(3)
    ids = torch.tensor([case.row(2, 3, 7), case.row(9, 3 + case.num_features)])
    assert ours.config.tokens_per_image == case.num_features
    seen = torch.stack(list(theirs.get_image_features(pixels).pooler_output))
    assert difference(ours.backbone.image_features(pixels), seen) <= CLOSE
    wanted = theirs(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    assert difference(ours.backbone(ids, pixels), wanted.hidden_states[-1]) <= CLOSE
    assert difference(ours(ids, pixels), wanted.logits) <= CLOSE
    words = ids.where(ids != IMAGE, torch.tensor(7))
    assert difference(ours(words), theirs(input_ids=words).logits) <= CLOSE


@by_name
@torch.no_grad()
def test_files_go_both_ways(case: Case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path / "theirs")
    ph.load(tmp_path / "theirs").save(tmp_path / "ours")
    before, after = (load_file(tmp_path / at / "model.safetensors") for at in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(tmp_path / "theirs") == config_of(tmp_path / "ours")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ids, pixels = torch.tensor([case.row(2, 4)]), images(1)
    said, wanted = (each(input_ids=ids, pixel_values=pixels).logits for each in (again, theirs))
    assert torch.equal(said, wanted)


@by_name
@torch.no_grad()
def test_a_fresh_model_loads_there(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path / "theirs")
    like = ph.load(tmp_path / "theirs").config
    assert isinstance(like, LlavaConfig)
    names = (
        "text vision image_token_id feature_layers keep activation projector_bias tie_embeddings"
    )
    fresh = ph.build("llava", seed=3, **{name: getattr(like, name) for name in names.split()})
    fresh.eval().save(tmp_path / "fresh")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "fresh").eval()
    ids, pixels = torch.tensor([case.row(2, 4)]), images(1)
    said = theirs(input_ids=ids, pixel_values=pixels).logits
    assert difference(fresh(ids, pixels), said) <= CLOSE


def as_before_version_5(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def as_in_memory(name: str) -> str:
    name = name.replace("language_model.lm_head.", "lm_head.")
    name = name.replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head.") else "model." + name


@pytest.mark.parametrize("rename", [as_before_version_5, as_in_memory])
@pytest.mark.parametrize("case", CASES[:5:4], ids=lambda case: case.name)
@torch.no_grad()
def test_other_names_of_the_same_tensors(
    case: Case, rename: Callable[[str], str], tmp_path: Path
) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    renamed = {rename(name): value for name, value in held.items()}
    assert renamed.keys().isdisjoint(held) or rename is as_before_version_5
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    # That these are names somebody writes: the reference reads them, too.
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, pixels = torch.tensor([case.row(2, 4)]), images(1)
    wanted = theirs(input_ids=ids, pixel_values=pixels).logits
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, wanted)
    assert difference(ph.load(tmp_path)(ids, pixels), wanted) <= CLOSE


@torch.no_grad()
def test_without_a_head(tmp_path: Path) -> None:
    theirs = CASES[0].make().model
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ph.load(tmp_path / "theirs")
    ids, pixels = torch.tensor([CASES[0].row(2, 4)]), images(1)
    wanted = theirs(input_ids=ids, pixel_values=pixels).last_hidden_state
    assert difference(ours(ids, pixels), wanted) <= CLOSE
    ours.save(tmp_path / "ours")
    again = transformers.LlavaModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).last_hidden_state, wanted)
    assert config_of(tmp_path / "theirs") == config_of(tmp_path / "ours")


@by_name
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@torch.no_grad()
def test_steps_after_an_image_equal_one_forward(case: Case, static: bool, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    ids, pixels = torch.tensor([case.row(2, 12), case.row(5, 9)]), images(2)
    whole = model(ids, pixels)
    caches = model.backbone.make_caches(2, 64 if static else None)
    start = 6 + case.num_features
    pieces = [model(ids[:, :start], pixels, caches=caches)]
    edges = [start, start + 3, *range(start + 4, ids.shape[1] + 1)]
    pieces += [model(ids[:, a:b], caches=caches) for a, b in pairwise(edges)]
    assert difference(torch.cat(pieces, dim=1), whole) <= CLOSE


@some
@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    rows, pixels = [case.row(3, 4), case.row(11), case.row(1, 2, 5)], images(3)
    of_row = (pixels[:1], None, pixels[1:])
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    keep = torch.arange(width) < lengths[:, None]
    # Padding that looks like an image is none.
    right = torch.tensor([row + [IMAGE] * (width - len(row)) for row in rows])
    left = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    batch, shifted = model(right, pixels, keep), model(left, pixels, keep.flip(1))
    caches = model.backbone.make_caches(3)
    model(right, pixels, keep, caches=caches)
    step = model(torch.tensor([[9], [8], [7]]), caches=caches)
    for number, (row, own) in enumerate(zip(rows, of_row, strict=True)):
        alone = model(torch.tensor([row]), own)[0]
        assert difference(batch[number, : len(row)], alone) <= CLOSE
        assert difference(shifted[number, width - len(row) :], alone) <= CLOSE
        longer = model(torch.tensor([[*row, 9 - number]]), own)[0, -1]
        assert difference(step[number, 0], longer) <= CLOSE


@some
@torch.no_grad()
def test_greedy_text_equals(case: Case, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    ids, pixels = torch.tensor([case.row(2, 3)]), images(1)
    wanted = theirs.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    caches = model.backbone.make_caches(1)
    logits, found = model(ids, pixels, caches=caches), ids
    for _ in range(20):
        token = logits[:, -1:].argmax(-1)
        found = torch.cat([found, token], dim=1)
        logits = model(token, caches=caches)
    assert found.tolist() == wanted.tolist()


def test_images_and_their_tokens_must_agree(tmp_path: Path) -> None:
    CASES[0].make().save_pretrained(tmp_path)
    model = ph.load(tmp_path)
    ids = torch.tensor([CASES[0].row(2, 4)])
    for pixels, words in (
        (images(2), "hold 9 image tokens and the images give 18 features"),
        (None, "hold 9 image tokens and the images give 0 features"),
    ):
        with pytest.raises(DataError, match=words):
            model(ids, pixels)
    with pytest.raises(DataError, match="hold 0 image tokens and the images give 9 features"):
        model(torch.full((1, 4), 7), images(1))


@torch.no_grad()
def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "qwen2-tied")
    theirs = case.make()
    theirs.save_pretrained(tmp_path / "tied")
    held = load_file(tmp_path / "tied" / "model.safetensors")
    held["language_model.lm_head.weight"] = torch.randn(60, 16)
    save_file(held, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    model = ph.load(tmp_path / "tied")
    ids = torch.tensor([[3, 4, 5]])
    hidden = model.backbone(ids)
    assert difference(model(ids), hidden @ held["language_model.lm_head.weight"].T) <= CLOSE
    model.save(tmp_path / "apart")
    again = ph.load(tmp_path / "apart")
    assert not again.config.tie_embeddings
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("said", [None, False])
@torch.no_grad()
def test_older_files_say_of_the_decoder_alone_that_it_is_tied(
    said: bool | None, tmp_path: Path
) -> None:
    case = next(case for case in CASES if case.name == "qwen2-tied")
    case.make().save_pretrained(tmp_path)
    data = {**config_of(tmp_path), "tie_word_embeddings": said}
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in data.items() if value is not None})
    )
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, pixels = torch.tensor([case.row(2, 4)]), images(1)
    wanted = theirs(input_ids=ids, pixel_values=pixels).logits
    assert difference(ph.load(tmp_path)(ids, pixels), wanted) <= CLOSE
