"""Layers that serve several depths, and reductions where they mean nothing."""

import itertools

import pytest
import torch
from tests.explain.models import IDS, answer, made

import polyhead as ph
from polyhead.explain.attribution import integrated_gradients, occlusion
from polyhead.explain.flow import gradient_attention, rollout
from polyhead.explain.lens import direct_logit_attribution
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


def test_padding_on_the_right_is_not_asked() -> None:
    model, alone = made("gpt2"), IDS[:1]
    pad = torch.zeros(1, 3, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([alone, pad], 1),
        "attention_mask": torch.cat([torch.ones_like(alone), pad], 1),
    }
    for measured in (occlusion, lambda *given: integrated_gradients(*given).values):
        ours = measured(model, inputs)[:, : alone.shape[1]]
        torch.testing.assert_close(ours, measured(model, alone), atol=1e-4, rtol=1e-4)
    padded, whole = (direct_logit_attribution(model, given) for given in (inputs, alone))
    torch.testing.assert_close(padded.heads, whole.heads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.total, whole.total, atol=1e-5, rtol=1e-4)
    with pytest.raises(ph.ConfigError, match="at is 99"):
        direct_logit_attribution(model, alone, at=99)


def test_direct_attribution_in_half_precision() -> None:
    found = direct_logit_attribution(made("gpt2").bfloat16(), IDS)
    torch.testing.assert_close(found.sum, found.total.float(), atol=0.1, rtol=0.1)


def test_stacks_that_do_not_follow_one_another() -> None:
    model = made("t5")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    with ph.capture(model) as seen:
        answer(model, inputs)
    with pytest.raises(ph.ConfigError, match="do not follow one another"):
        rollout(seen)
    with pytest.raises(ph.ConfigError, match="do not follow one another"):
        gradient_attention(model, inputs)
    assert gradient_attention(model, inputs, where="encoder").shape == (2, *IDS.shape[1:] * 2)
