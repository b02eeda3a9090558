"""What is captured equals what transformers gives out, in every family."""

from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.explain.images import image_maps

transformers = pytest.importorskip("transformers")

from tests.explain.theirs import INSIDE, check_inside, eager, near  # noqa: E402
from tests.models import (  # noqa: E402
    test_albert,
    test_bert,
    test_clip,
    test_deberta,
    test_llava,
    test_marian,
    test_swin,
    test_t5,
    test_vit,
)
from tests.models.family_oracle import FamilyCase, padded_texts  # noqa: E402
from tests.models.oracle import CASES as DECODERS  # noqa: E402

FAMILIES: list[FamilyCase] = [
    *test_bert.CASES, *test_albert.CASES, *test_deberta.CASES,
    *test_t5.PAIRS, *test_t5.ALONE, *test_marian.CASES,
]  # fmt: skip


def named(case: Any) -> str:
    return case.name


@pytest.mark.parametrize("case", DECODERS, ids=named)
def test_decoders(case: Any, tmp_path: Path) -> None:
    theirs = case.save(tmp_path)
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(5))
    check_inside(tmp_path, theirs, {"input_ids": ids})


@pytest.mark.parametrize("case", FAMILIES, ids=named)
def test_families(case: FamilyCase, tmp_path: Path) -> None:
    theirs = case.save(tmp_path)
    check_inside(tmp_path, theirs, case.inputs(theirs.config, 1))


@pytest.mark.parametrize(
    "case", [*test_bert.CASES, *test_albert.CASES, *test_deberta.CASES], ids=named
)
def test_padded(case: FamilyCase, tmp_path: Path) -> None:
    theirs = case.save(tmp_path)
    check_inside(tmp_path, theirs, padded_texts(theirs.config, 2))


@pytest.mark.parametrize("case", test_vit.CASES, ids=named)
def test_images(case: Any, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    check_inside(tmp_path, theirs, {"pixel_values": case.pixels()}, **case.named)


@pytest.mark.parametrize("case", test_swin.CASES, ids=named)
@torch.no_grad()
def test_what_swin_s_blocks_read(case: Any, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    states = theirs(pixel_values=case.pixels(), output_hidden_states=True).hidden_states
    ours = ph.load(tmp_path)
    with ph.capture(ours, "*.layers.0", "residual_in") as seen:
        ours(case.pixels())
    # Theirs gives what each stage reads.
    for (name, state), expected in zip(seen.items(), states, strict=False):
        assert near(state, expected), name


@pytest.mark.parametrize("case", test_clip.CASES, ids=named)
@torch.no_grad()
def test_both_towers(case: Any, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    ids, images = case.inputs()
    mask = (torch.arange(11) < torch.tensor([[11], [5], [8]])).long()
    inputs = {"input_ids": ids, "pixel_values": images, "attention_mask": mask}
    output = eager(theirs)(**inputs, **INSIDE)
    ours = ph.load(tmp_path)
    with ph.capture(ours, what=("weights", "residual_in")) as seen:
        ours(**inputs)
    for part, own in (("text", output.text_model_output), ("vision", output.vision_model_output)):
        parts = {
            what: [x for name, x in found.items() if f".{part}." in name]
            for what, found in seen.items()
        }
        for what, expected in (("weights", own.attentions), ("residual_in", own.hidden_states)):
            for x, given in zip(parts[what], expected, strict=False):
                keep = mask.bool() if part == "text" else torch.ones(x.shape[0], x.shape[-2]).bool()
                x, given = (t.transpose(1, 2) if what == "weights" else t for t in (x, given))
                assert near(x[keep], given[keep])
            assert len(parts[what]) == len(own.attentions)


@pytest.mark.parametrize("case", test_llava.CASES, ids=named)
@torch.no_grad()
def test_a_decoder_that_reads_images(case: Any, tmp_path: Path) -> None:
    theirs = case.make()
    theirs.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([case.row(3, 5, 4)]), "pixel_values": test_llava.images(2)}
    output = eager(theirs)(**inputs, output_attentions=True)
    ours = ph.load(tmp_path)
    with ph.capture(ours, "backbone.language.*") as seen:
        ours(**inputs)
    assert len(seen) == len(output.attentions)
    assert all(near(x, y) for x, y in zip(seen.values(), output.attentions, strict=True))
    with ph.capture(ours, "backbone.vision.*") as seen:
        ours(**inputs)
    assert all(near(x.sum(-1), torch.ones_like(x[..., 0])) for x in seen.values())


# Ours, by what it is called, beside the input or the answer of one of their modules.
STAGES: dict[str, dict[str, tuple[str, str]]] = {
    "llama": {
        "heads": ("model.layers.{i}.self_attn.o_proj", "in"),
        "attention_out": ("model.layers.{i}.self_attn", "out"),
        "neurons": ("model.layers.{i}.mlp.down_proj", "in"),
        "ffn_out": ("model.layers.{i}.mlp", "out"),
        "values": ("model.layers.{i}.self_attn.v_proj", "out"),
        "residual": ("model.layers.{i}", "out"),
    },
    "gpt2": {
        "heads": ("transformer.h.{i}.attn.c_proj", "in"),
        "attention_out": ("transformer.h.{i}.attn", "out"),
        "neurons": ("transformer.h.{i}.mlp.c_proj", "in"),
        "ffn_out": ("transformer.h.{i}.mlp", "out"),
        "residual": ("transformer.h.{i}", "out"),
    },
    "mixtral": {
        "routing": ("model.layers.{i}.mlp.gate", "out"),
        "ffn_out": ("model.layers.{i}.mlp", "out"),
    },
    "qwen2moe": {
        "routing": ("model.layers.{i}.mlp.gate", "out"),
        "neurons": ("model.layers.{i}.mlp.shared_expert.down_proj", "in"),
    },
}


def flat(x: torch.Tensor, what: str) -> torch.Tensor:
    """As their layers have it: heads beside each other."""
    return x.transpose(1, 2).flatten(2) if what in ("heads", "values") else x


@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_every_stage(name: str, tmp_path: Path) -> None:
    case = next(case for case in DECODERS if case.name == name)
    theirs = eager(case.save(tmp_path))
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(5))
    kept: dict[tuple[str, int], torch.Tensor] = {}

    def keep(what: str, i: int, side: str) -> Any:
        def hook(_: Any, given: Any, kwargs: Any, answer: Any) -> None:
            found = (given or tuple(kwargs.values()))[0] if side == "in" else answer
            kept[what, i] = found[0] if isinstance(found, tuple) else found

        return hook

    for what, (place, side) in STAGES[name].items():
        for i in range(3):
            part = theirs.get_submodule(place.format(i=i))
            part.register_forward_hook(keep(what, i, side), with_kwargs=True)
    theirs(ids)
    ours = ph.load(tmp_path)
    with ph.capture(ours, what=tuple(STAGES[name])) as seen:
        ours(ids)
    for what, found in seen.items():
        assert len(found) == 3
        for i, x in enumerate(found.values()):
            expected = kept[what, i]
            assert near(flat(x, what), expected.reshape(flat(x, what).shape)), (what, i)


@pytest.mark.parametrize("family", [test_clip, test_llava])
def test_maps_of_the_tower_that_reads_images(family: Any, tmp_path: Path) -> None:
    case = family.CASES[0]
    case.make().save_pretrained(tmp_path)
    images = test_llava.images(2) if family is test_llava else case.inputs()[1]
    model = ph.load(tmp_path)
    maps = image_maps(model, images)
    with ph.capture(model, "vision") as seen:
        model.backbone.vision(images)
    assert list(maps) == list(seen)
    for name, found in maps.items():
        assert torch.equal(found.flatten(2), seen[name][:, :, 0, 1:])
