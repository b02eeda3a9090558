"""Where answers come from: rollout, flow, gradients, and what is missing without a part."""

import pytest
import torch
from tests.explain.models import FAMILIES, IDS, IMAGES, answer, inputs_of, made
from torch import Tensor

import polyhead as ph
from polyhead.explain.attribution import integrated_gradients, occlusion
from polyhead.explain.flow import attention_flow, gradient_attention, rollout
from polyhead.explain.inputs import logit


def drawn(layers: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.rand(2, 4, tokens, tokens, generator=generator).softmax(-1) for _ in range(layers)
    ]


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
def test_rollout_is_the_product_of_the_layers(residual: float) -> None:
    weights = drawn(3, 5)
    found = rollout(weights, residual)
    one, two, three = (residual * torch.eye(5) + (1 - residual) * w.mean(1) for w in weights)
    torch.testing.assert_close(found, three @ (two @ one))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5))


def test_rollout_of_a_model() -> None:
    model = made("llama")
    with ph.capture(model) as seen:
        answer(model, IDS)
    found = rollout(seen)
    assert found.shape == (2, 9, 9)
    assert found.triu(1).eq(0).all()


def test_the_most_that_flows() -> None:
    pytest.importorskip("scipy")
    one = drawn(1, 5)
    mixed = 0.5 * torch.eye(5) + 0.5 * one[0].mean(1)
    for token in (-1, 2):
        torch.testing.assert_close(attention_flow(one, token), mixed[:, token], atol=1e-4, rtol=0.0)
    # Two layers of two tokens: what comes out of the top is held up by the narrower of two pipes.
    low, high = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([[1.0, 0.0], [0.6, 0.4]])
    found = attention_flow([low[None, None], high[None, None]], 1, residual=0.0)
    torch.testing.assert_close(found, torch.tensor([[0.6 + 0.3, 0.1 + 0.4]]), atol=1e-4, rtol=0.0)


def test_weights_of_two_stacks_do_not_follow_one_another() -> None:
    model, inputs = made("t5"), inputs_of("t5")
    with ph.capture(model) as seen:
        answer(model, inputs)
    with pytest.raises(ph.ConfigError, match="self-attention of one stack"):
        rollout(seen)
    with pytest.raises(ph.ConfigError, match="no layer at all"):
        rollout([])


@pytest.mark.parametrize("name", ["llama", "bert-classify", "albert", "deberta", "vit"])
def test_gradients_times_weights(name: str) -> None:
    model, inputs = made(name), inputs_of(name)
    found = gradient_attention(model, inputs, logit(2))
    with ph.capture(model, graph=True) as seen:
        value = logit(2)(model(inputs)).sum()
    slopes = torch.autograd.grad(value, list(seen.values()))
    expected = torch.eye(found.shape[-1]).expand_as(found)
    for weights, slope in zip(seen.values(), slopes, strict=True):
        expected = expected + (weights * slope).clamp(min=0).mean(1).detach() @ expected
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model.requires_grad_(False)
    torch.testing.assert_close(gradient_attention(model, inputs, logit(2)), found)


@pytest.mark.parametrize("name", FAMILIES)
def test_integrated_gradients_are_complete(name: str) -> None:
    model, inputs = made(name), inputs_of(name)
    logits = answer(model, inputs)
    found = integrated_gradients(model, inputs)
    last = logits[:, -1] if logits.dim() == 3 else logits
    torch.testing.assert_close(found.answer, last.amax(-1), atol=1e-5, rtol=1e-5)
    missing = found.values.flatten(1).sum(1) - (found.answer - found.baseline)
    # Where tokens go to other experts on the way the answer jumps, and the error says so.
    assert name == "mixtral" or (found.error <= 0.01).all(), found.error
    expected = missing.abs() / (found.answer - found.baseline).abs()
    torch.testing.assert_close(found.error, expected)
    expected = IMAGES.shape if name in ("vit", "swin") else IDS.shape
    assert found.values.shape == expected


def test_a_baseline_of_a_token_and_padding_that_counts_for_nothing() -> None:
    model = made("bert-classify")
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    found = integrated_gradients(model, {"input_ids": IDS, "attention_mask": keep}, logit(1), 3)
    alone = integrated_gradients(model, IDS[1:, :5], logit(1), 3)
    torch.testing.assert_close(found.values[1, :5], alone.values[0], atol=1e-5, rtol=1e-4)
    assert found.values[1, 5:].eq(0).all()
    assert found.error.max() < 0.01
    torch.testing.assert_close(
        found.baseline[:1], logit(1)(answer(model, torch.full((1, 9), 3))), atol=1e-5, rtol=1e-5
    )


def test_occlusion_of_tokens_and_patches() -> None:
    model = made("bert-classify")
    found = occlusion(model, IDS, logit(1), by=4)
    hidden = IDS.clone()
    hidden[:, 6] = 4
    expected = logit(1)(answer(model, IDS)) - logit(1)(answer(model, hidden))
    torch.testing.assert_close(found[:, 6], expected)
    assert found.shape == (2, 9)
    vit = made("vit")
    found = occlusion(vit, IMAGES, logit(3), patch=4)
    image = IMAGES.clone()
    image[:, :, 4:8, 12:16] = 0
    expected = logit(3)(answer(vit, IMAGES)) - logit(3)(answer(vit, image))
    torch.testing.assert_close(found[:, 1, 3], expected)
    assert found.shape == (2, 4, 4)
    with pytest.raises(ph.ConfigError, match="name the edge"):
        occlusion(vit, IMAGES)
