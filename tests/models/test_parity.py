"""Every decoder family equals transformers, to rounding, both ways."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polyhead as ph

transformers = pytest.importorskip("transformers")

from tests.models.oracle import CASES, Case  # noqa: E402

CLOSE = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_device_there_is() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours.float() - theirs.float()).abs().max().item()


@by_name
def test_logits_equal(case: Case, tmp_path: Path) -> None:
    theirs = case.save(tmp_path)
    ours = ph.load(tmp_path, device=DEVICE)
    ids = torch.randint(0, 61, (3, 23))
    with torch.no_grad():
        assert difference(ours(ids), theirs(ids).logits) <= CLOSE


@by_name
def test_padding_changes_nothing(case: Case, tmp_path: Path) -> None:
    theirs = case.save(tmp_path)
    ours = ph.load(tmp_path, device=DEVICE)
    ids = torch.randint(0, 61, (3, 20))
    lengths = (20, 7, 12)
    mask = torch.tensor([[1] * n + [0] * (20 - n) for n in lengths])
    with torch.no_grad():
        batch = ours(ids, mask)
        for row, length in enumerate(lengths):
            alone = ours(ids[row : row + 1, :length])
            assert difference(batch[row, :length], alone[0]) <= CLOSE
            assert difference(alone, theirs(ids[row : row + 1, :length]).logits) <= CLOSE
        # Left padding, as transformers' users pad.
        shifted = torch.roll(ids[1:2], 13, dims=1)
        left = ours(shifted, torch.roll(mask[1:2], 13, dims=1))
        assert difference(left[0, 13:], batch[1, :7]) <= CLOSE


@by_name
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_chunks_and_steps_equal_one_forward(case: Case, static: bool, tmp_path: Path) -> None:
    case.save(tmp_path)
    model = ph.load(tmp_path, device=DEVICE)
    # Dynamic frequencies follow the length: beyond the trained one, steps may differ.
    reach = 8 if case.name == "llama-dynamic" else 18
    ids = torch.randint(0, 61, (2, reach))
    edges = [0, 4, 6, *range(7, reach + 1)] if reach == 8 else [0, 7, 12, *range(13, reach + 1)]
    with torch.no_grad():
        caches = model.backbone.make_caches(2, 24 if static else None)
        pieces = [model(ids[:, a:b], caches=caches) for a, b in pairwise(edges)]
        assert difference(torch.cat(pieces, dim=1), model(ids)) <= CLOSE


@by_name
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_ragged_rows_decode_as_alone(case: Case, static: bool, tmp_path: Path) -> None:
    case.save(tmp_path)
    model = ph.load(tmp_path, device=DEVICE)
    lengths = torch.tensor([3, 11, 6])
    prompts = torch.randint(0, 61, (3, 11))
    steps = torch.randint(0, 61, (3, 7))
    mask = torch.arange(11) < lengths[:, None]
    with torch.no_grad():
        caches = model.backbone.make_caches(3, 24 if static else None)
        model(prompts, mask, caches=caches)
        batch = torch.cat([model(steps[:, t : t + 1], caches=caches) for t in range(7)], dim=1)
        assert caches.lengths.tolist() == (lengths + 7).tolist()
        for row, length in enumerate(lengths.tolist()):
            alone = model.backbone.make_caches(1)
            model(prompts[row : row + 1, :length], caches=alone)
            for t in range(7):
                step = model(steps[row : row + 1, t : t + 1], caches=alone)
                assert difference(batch[row, t], step[0, 0]) <= CLOSE


@by_name
def test_what_we_save_they_load(case: Case, tmp_path: Path) -> None:
    theirs = case.save(tmp_path / "theirs")
    ours = ph.load(tmp_path / "theirs", device=DEVICE)
    ours.save(tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = [
        json.loads((tmp_path / place / "config.json").read_text()) for place in ("theirs", "ours")
    ]
    assert config[0] == config[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval().to(DEVICE)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        assert difference(again(ids).logits, theirs(ids).logits) <= 1e-6


@by_name
def test_a_fresh_model_loads_in_transformers(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path / "theirs")
    like = ph.load(tmp_path / "theirs", device=DEVICE).config
    row = like.row(like.model_type)
    fields = {
        name: getattr(like, name)
        for name in like.__dataclass_fields__
        if name not in ("source", "model_type") and name not in row.implied
    }
    fresh = ph.build(like.model_type, seed=1, **fields).eval()
    fresh.save(tmp_path / "fresh")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh").eval().to(DEVICE)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        assert difference(fresh(ids), theirs(ids).logits) <= CLOSE


def test_half_precision_follows_the_reference(tmp_path: Path) -> None:
    for case in CASES:
        if case.name not in ("gpt2", "llama-3", "qwen3", "mixtral"):
            continue
        theirs = case.save(tmp_path / case.name).bfloat16()
        ours = ph.load(tmp_path / case.name, dtype="bfloat16", device=DEVICE)
        ids = torch.randint(0, 61, (2, 12))
        with torch.no_grad():
            exact = case.make()(ids).logits
            wrong, reference = difference(ours(ids), exact), difference(theirs(ids).logits, exact)
        assert wrong <= 2 * reference + 1e-2


def test_base_checkpoints_load_without_a_head(tmp_path: Path) -> None:
    for case in CASES[:6]:
        theirs = case.make()
        theirs.base_model.save_pretrained(tmp_path / case.name)
        ours = ph.load(tmp_path / case.name, device=DEVICE)
        ids = torch.randint(0, 61, (2, 8))
        with torch.no_grad():
            assert difference(ours(ids), theirs.base_model(ids).last_hidden_state) <= CLOSE
        ours.save(tmp_path / (case.name + "-again"))
        again = (
            transformers.AutoModel.from_pretrained(tmp_path / (case.name + "-again"))
            .eval()
            .to(DEVICE)
        )
        with torch.no_grad():
            assert difference(ours(ids), again(ids).last_hidden_state) <= CLOSE
