"""µP's promise: what a few steps change is as large at every width."""

import pytest
import torch
from recipes.mup import BASE, PLACES, built, checked, slopes

from polyhead.train.config import TrainConfig
from polyhead.train.optim import settings_of


def test_at_the_base_width_the_two_are_one():
    ids = torch.tensor([[1, 5, 3, 7, 2]])
    one, other = (built(kind, BASE, 20)[0].eval() for kind in ("standard", "mup"))
    assert torch.equal(one(ids), other(ids))


def test_matrices_learn_slower_and_all_else_as_before():
    model, rates = built("mup", 4 * BASE, 20)
    names = [name for name, _ in model.named_parameters()]
    found = {
        name: factor
        for name, factor, _ in settings_of(model, names, TrainConfig(rates=tuple(rates)))
    }
    for name, factor in found.items():
        parts = name.split(".")
        is_matrix = "layers" in parts and parts[-1] == "weight" and "norm" not in parts[-2]
        assert factor == (0.25 if is_matrix else 1.0), name
    narrow = built("mup", BASE, 20)[0]
    widths = [model.backbone.layers[0].ffn.up.weight.std().item() for model in (narrow, model)]
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.05)
    assert model.head.scale == 0.25
    assert model.backbone.layers[0].attention.scale == pytest.approx(8**-0.5 / 4)


def test_coordinates_grow_with_width_but_not_in_mup():
    ids = torch.randint(20, (8000,), generator=torch.Generator().manual_seed(0))
    widths = (32, 64, 128)
    powers = {
        kind: slopes(checked(kind, widths, 1, ids, 0.02, steps=3)) for kind in ("standard", "mup")
    }
    for place in PLACES:
        assert powers["mup"][place] < 0.2, place
        assert powers["standard"][place] > powers["mup"][place] + 0.2, place
