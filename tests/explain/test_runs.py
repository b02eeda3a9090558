"""Layers that serve several depths, and reductions where they mean nothing."""

import itertools

import pytest
import torch
from tests.explain.models import IDS, answer, made

import polyhead as ph
from polyhead.explain.replace import without


def test_a_head_of_one_depth_is_knocked_out() -> None:
    model = made("albert")
    place = "backbone.layers.0.0.attention"
    plain = answer(model, IDS)
    found: list[torch.Tensor] = []
    for named in (place, f"{place}@1", f"{place}@2"):
        with ph.knock_out(model, [(named, 0)]):
            found.append(answer(model, IDS))
    assert not any(
        torch.equal(one, other) for one, other in itertools.combinations([plain, *found], 2)
    )
    with ph.replace(model, f"{place}@1", "heads", without([0], 1)):
        assert torch.equal(answer(model, IDS), found[1])


@pytest.mark.parametrize("name", ["albert", "llama"])
def test_a_run_that_there_is_not(name: str) -> None:
    model = made(name)
    with pytest.raises(ph.ConfigError, match="there was no run '9'"), ph.capture(model, "*@9"):
        answer(model, IDS)
    with (
        pytest.raises(ph.ConfigError, match=r"runs \d times a forward"),
        ph.replace(model, "layers.0@7", "residual", lambda x: x),
    ):
        answer(model, IDS)
    with ph.capture(model, "*@9"):
        pass  # nothing ran, so nothing is known


@pytest.mark.parametrize("how", ["mean", "entropy", "received"])
def test_a_reduction_of_weights_is_of_weights(how: str) -> None:
    model = made("llama")
    with (
        pytest.raises(ph.ConfigError, match="is of attention's weights; of residual keep"),
        ph.capture(model, "*", ("weights", "residual"), how),
    ):
        pass
    with ph.capture(model, "layers.1", "residual", "top-2") as seen:
        answer(model, IDS)
    assert seen["backbone.layers.1"].indices.shape == (*IDS.shape, 2)
