"""What a model would say if it stopped, and which parts make it say what it says."""

import pytest
import torch
from tests.explain.models import FAMILIES, IDS, SIZES, answer, inputs_of, made

import polyhead as ph
from polyhead.explain.lens import LogitLens, direct_logit_attribution
from polyhead.explain.tuned import TunedLens


@pytest.mark.parametrize("name", FAMILIES)
def test_after_the_last_layer_it_is_the_answer(name: str) -> None:
    model, inputs = made(name), inputs_of(name)
    logits = answer(model, inputs)
    lens = LogitLens(model)
    with torch.no_grad(), ph.capture(model, lens.last, "residual") as seen:
        answer(model, inputs)
        state = list(seen.values())[-1]
        torch.testing.assert_close(lens(state), logits, atol=1e-5, rtol=1e-5)
    where = lens.last if name == "swin" else None
    tops = lens.layers(inputs, 3, where)
    best = logits.log_softmax(-1).topk(3)
    last = list(tops.values())[-1]
    torch.testing.assert_close(last.values, best.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(last.indices, best.indices)
    assert len(tops) == (1 if name == "swin" else 2 if name == "vit" else 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_by_layer_are_captured(name: str) -> None:
    model, inputs = made(name), inputs_of(name)
    logits = answer(model, inputs)
    lens = LogitLens(model)
    with torch.no_grad():
        with ph.capture(model, "*", ("logits", "residual")) as seen:
            unchanged = answer(model, inputs)
        assert torch.equal(logits, unchanged)
        by_layer = seen["logits"]
        assert by_layer
        assert set(by_layer) <= set(seen["residual"])
        for place, found in by_layer.items():
            assert torch.equal(found, lens(seen["residual"][place]))
    torch.testing.assert_close(list(by_layer.values())[-1], logits, atol=1e-5, rtol=1e-5)


def test_logits_are_reduced_and_not_replaced() -> None:
    model = made("llama")
    with ph.capture(model, "layers.1", "logits", lambda logits: logits.argmax(-1)) as seen:
        answer(model, IDS)
    assert seen["backbone.layers.1"].shape == IDS.shape
    with (
        pytest.raises(ph.ConfigError, match="replace its residual"),
        ph.replace(model, "layers.1", "logits", torch.zeros(1)),
    ):
        pass
    classifier = ph.build("llama", head="classify", **SIZES)
    with (
        pytest.raises(ph.ConfigError, match="no block with a head above it that reads tokens"),
        ph.capture(classifier, "*", "logits"),
    ):
        pass
    with (
        pytest.raises(ph.ConfigError, match="no block with a head"),
        ph.capture(model.backbone, "*", "logits"),
    ):
        pass


@pytest.mark.parametrize("name", ["llama", "llama-biases", "gpt2", "gpt2-untied", "mixtral"])
@pytest.mark.parametrize("at", [-1, 3])
def test_what_the_parts_add_is_the_logit(name: str, at: int) -> None:
    model = made(name)
    logits = answer(model, IDS)[:, at]
    for of in (None, 7, torch.tensor([4, 9])):
        found = direct_logit_attribution(model, IDS, of, at)
        chosen = logits.argmax(-1) if of is None else torch.as_tensor(of).expand(2)
        expected = logits.gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(found.total, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.sum, expected, atol=1e-4, rtol=1e-4)
        assert found.heads.shape == (2, 3, 4)


def test_a_head_adds_nothing_when_it_is_knocked_out() -> None:
    model = made("llama")
    with ph.knock_out(model, [(1, 2)]):
        found = direct_logit_attribution(model, IDS, 5)
    assert found.heads[:, 1, 2].eq(0).all()
    assert found.heads[:, 1, 1].ne(0).all()


@pytest.mark.parametrize("name", ["bert", "t5", "transformer"])
def test_what_is_no_sum_is_not_attributed(name: str) -> None:
    with pytest.raises(ph.ConfigError, match="direct attribution is of decoders"):
        direct_logit_attribution(made(name), inputs_of(name))


def test_other_stages_and_no_head_are_refused() -> None:
    swin = made("swin")
    with pytest.raises(ph.ConfigError, match=r"states of width 16 .* backbone\.stages\.1"):
        LogitLens(swin).layers(inputs_of("swin"), 3, "stages.0")
    with pytest.raises(ph.ConfigError, match="loaded without one"):
        LogitLens(ph.build("bert", head="none", vocab_size=31, d_model=16, d_ff=24, num_heads=2))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("lstm", dict(vocab_size=31, d_model=16, num_layers=1)), ("bigram", dict(vocab_size=31))],
)
def test_a_model_without_blocks_has_no_lens(family: str, sizes: dict[str, int]) -> None:
    with pytest.raises(ph.ConfigError, match="has no stack of blocks"):
        LogitLens(ph.build(family, **sizes))


def test_what_a_tuned_lens_cannot_tell() -> None:
    with pytest.raises(ph.ConfigError, match="is of a language head"):
        TunedLens(ph.build("llama", head="classify", **SIZES))
    lens = TunedLens(made("albert"))
    with pytest.raises(ph.ConfigError, match="serves several depths"):
        lens.layers(IDS)
    t5 = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    assert TunedLens(made("t5")).fit([t5])
