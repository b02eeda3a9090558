"""What cannot be asked is refused with a line that says what can."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.explain.models import IDS, IMAGES, answer, inputs_of, made

import polyhead as ph
from polyhead.explain import plots
from polyhead.explain.alignment import alignment
from polyhead.explain.attribution import integrated_gradients, occlusion
from polyhead.explain.flow import attention_flow, gradient_attention, rollout
from polyhead.explain.inputs import logit
from polyhead.explain.lens import direct_logit_attribution
from polyhead.explain.patching import patching_grid
from polyhead.explain.reduce import Top
from polyhead.kernels import pack
from polyhead.train.recompute import recomputing

TOPS = {"a": Top(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2, dtype=torch.long))}


def seen(*given: Any) -> None:
    model = made("gpt2")
    with ph.capture(model, *given):
        answer(model, IDS)


def other_lengths() -> None:
    given = inputs_of("t5")
    patching_grid(made("t5"), given, {**given, "input_ids": given["input_ids"].flip(1)}, logit(3))


ASKED: list[tuple[Callable[[], object], str]] = [
    (lambda: plots.heatmap(torch.zeros(0, 0), []), "none of them empty"),
    (lambda: plots.head_grid(torch.zeros(3, 3), "abc"), "of 3 dimensions"),
    (lambda: plots.layer_heads(torch.zeros(3)), "of 2 dimensions"),
    (lambda: plots.by_layer(torch.zeros(4), "x"), "of 2 dimensions"),
    (lambda: plots.projection(torch.zeros(4), "abcd"), "of 2 dimensions"),
    (lambda: plots.over_images(torch.zeros(4, 4), torch.zeros(1, 2, 2)), "of 3 dimensions"),
    (lambda: plots.lens_table(TOPS, "abc", str, row=5), "row 5 of 2 in 1 layers"),
    (lambda: plots.lens_table({}, "abc", str), "row 0 of 0 in 0 layers"),
    (lambda: seen(None), "where is None; give one name"),
    (lambda: seen(["layers.0"]), "give one name or pattern"),
    (lambda: seen("*", None), "what is empty; choose of"),
    (lambda: seen("*", "weights", "top-²"), "reduce is 'top-²'"),
    (lambda: seen("*", "weights", 3), "reduce is 3"),
    (lambda: alignment(made("t5"), IDS, IDS, heads=[9]), r"heads are \[9\] of 4"),
    (lambda: alignment(made("t5"), IDS, IDS, heads=[]), r"heads are \[\] of 4"),
    (lambda: occlusion(made("vit"), IMAGES, patch=0), "patch is 0; name the edge"),
    (lambda: occlusion(made("vit"), IMAGES, patch=-1), "patch is -1"),
    (lambda: occlusion(made("gpt2"), IDS, logit(999)), "of is .*, and the model has 31 answers"),
    (lambda: direct_logit_attribution(made("gpt2"), IDS, of=-5), "has 31 answers; count from 0"),
    (lambda: direct_logit_attribution(pack(made("gpt2")), IDS), "it was packed from"),
    (lambda: integrated_gradients(pack(made("gpt2")), IDS), "packed model has no gradients"),
    (lambda: gradient_attention(pack(made("gpt2")), IDS), "packed model has no gradients"),
    (lambda: gradient_attention(made("t5"), inputs_of("t5"), where="cross"), "do not follow one"),
    (lambda: attention_flow({}), "of no layer at all"),
    (lambda: rollout([]), "of no layer at all"),
    (other_lengths, r"columns; name one stack"),
]


@pytest.mark.parametrize(("ask", "told"), ASKED, ids=[told for _, told in ASKED])
def test_what_cannot_be(ask: Callable[[], object], told: str) -> None:
    if "picture" in told or "plots" in ask.__code__.co_names:
        pytest.importorskip("matplotlib")
    with pytest.raises(ph.ConfigError, match=told):
        ask()


@pytest.mark.parametrize("does", ["capture", "replace"])
def test_blocks_that_are_made_again(does: str) -> None:
    model = made("gpt2").train()
    watching = (
        ph.capture(model, "layers.1")
        if does == "capture"
        else ph.replace(model, "layers.1", "attention_out", lambda x: 0 * x)
    )
    with recomputing(model, "blocks"), watching:
        loss = model(IDS).square().mean()
        with pytest.raises(ph.ConfigError, match="recomputed on the way back"):
            loss.backward()


def test_a_decoder_that_learns_nothing_has_gradients_of_weights() -> None:
    model, given = made("t5"), inputs_of("t5")
    layers = "*.decoder.layers.*.attention"
    learning = gradient_attention(model, given, where=layers)
    model.requires_grad_(False)
    torch.testing.assert_close(gradient_attention(model, given, where=layers), learning)
